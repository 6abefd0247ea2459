"""Native kernels, end to end: a request's tokens are the same bits whatever else runs, however it is cut (E0)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.core.request import SamplingParams
from penstock.llm import LLM
from penstock.nn.kernels.native import usable_kernels

pytestmark = pytest.mark.skipif(
    not usable_kernels(), reason="the native kernels were not built, or not for this machine"
)
NUM_OUT = 24
WINDOWED = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "sliding_window": 40,
    "torch_dtype": "bfloat16",
}


class Model:
    """A model, in bf16 unless its name says more, and what it answers: whole prompts in one batch on one thread."""

    def __init__(self, name: str, directory: Path) -> None:
        self.settings: dict[str, Any] = {"model": "penstock-tiny"}
        self.windowed = "windowed" in name
        if self.windowed:
            (directory / "config.json").write_text(json.dumps(WINDOWED))
            self.settings = {"model": str(directory), "tokenizer": "penstock-tiny", "load_format": "dummy"}
        self.settings["kv_cache_dtype"] = "int8" if "int8" in name else "bfloat16"
        for scheme in ("w8a8", "w4a8"):
            if scheme in name:
                self.settings["quantization"] = scheme
        random = np.random.default_rng(3)
        shared = random.integers(16, 8000, 70).tolist()
        lengths = (3, 9, 33, 40, 63, 120)
        self.prompts = [
            (shared if i % 2 else []) + random.integers(16, 8000, n).tolist() for i, n in enumerate(lengths)
        ]
        with self.engine(num_threads=1) as llm:
            self.expected = self.answers(llm)

    def engine(self, **settings: Any) -> LLM:
        common = {"dtype": "bfloat16", "max_num_seqs": 8, "max_model_len": 384, "kv_cache_memory_bytes": "64M"}
        return LLM(**{**common, **self.settings, **settings})

    def answers(self, llm: LLM) -> list[list[int]]:
        """Half of the requests are greedy, half sample."""
        params = [
            SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=NUM_OUT, ignore_eos=True, detokenize=False)
            for i in range(len(self.prompts))
        ]
        return [r.outputs[0].token_ids for r in llm.generate(self.prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module", params=["penstock-tiny", "windowed", "penstock-tiny, int8 KV", "windowed, int8 KV"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_an_int8_cache_says_how_it_is_packed(kernels: str) -> None:
    """Plain torch and native kernels pack blocks differently: neither may take the other's for its own."""
    settings = {"dtype": "bfloat16", "kv_cache_dtype": "int8", "kv_cache_memory_bytes": "16M", "max_model_len": 256}
    with LLM("penstock-tiny", cpu_kernels=kernels, **settings) as llm:
        scheduler = llm._built.engine.scheduler
        packing = "paired" if kernels == "auto" else "plain"
        assert scheduler.layout.format == f"full:6x2x32x64:int8*bfloat16:hm:{packing}"
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        prompt = "Once upon a time there was a little dog who lived in a small house. " * 4
        first, again = (llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for _ in range(2))
        assert scheduler.counters.prefix_hits > 0
    with LLM("penstock-tiny", cpu_kernels=kernels, **settings | {"kv_cache_dtype": "bfloat16"}) as llm:
        exact = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    assert sum(a == b == c for a, b, c in zip(first, again, exact, strict=True)) >= 6


@pytest.mark.parametrize("depth", ["off", "on"])
@pytest.mark.parametrize("step_tokens", [1, 7, 16, 512])
def test_chunking_depth_threads_and_hits(model: Model, step_tokens: int, depth: str) -> None:
    sizes = {"max_num_batched_tokens": step_tokens, "max_num_seqs": min(8, step_tokens)}
    with model.engine(**sizes, async_scheduling=depth, num_threads=1 + step_tokens % 2) as llm:
        assert "kernels" in llm._built.ready.device
        assert model.answers(llm) == model.expected
        if step_tokens >= 16:
            assert model.answers(llm) == model.expected
            assert llm._built.engine.scheduler.counters.prefix_hits > 0


def test_prompt_logprobs_are_the_same_bits_however_prompts_are_cut(model: Model) -> None:
    """Every second request asks for them: of its prompt all hidden states are read, of others' the last ones."""

    def answers(**settings: Any) -> list[tuple[list[int], Any]]:
        with model.engine(**settings) as llm:
            outputs = llm.generate(model.prompts, params, use_tqdm=False)
        return [(each.outputs[0].token_ids, each.prompt_logprobs) for each in outputs]

    common = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    params = [SamplingParams(**common, prompt_logprobs=2 * (i % 2) or None) for i in range(len(model.prompts))]
    expected = answers(max_num_seqs=1, num_threads=1)
    assert all((found is not None) == (i % 2 == 1) for i, (_, found) in enumerate(expected))
    for step_tokens in (7, 50, 512):
        assert answers(max_num_batched_tokens=step_tokens, max_num_seqs=min(8, step_tokens)) == expected


def test_alone_and_without_the_prefix_cache(model: Model) -> None:
    with model.engine(enable_prefix_caching=False, max_num_seqs=1, num_threads=3) as llm:
        assert model.answers(llm) == model.expected


def test_preemption(model: Model) -> None:
    with model.engine() as llm:
        block_bytes = llm._built.engine.scheduler.layout.groups[0].block_bytes
    num_blocks = 10 if model.windowed else 17  # a window holds little, so little must be there
    with model.engine(kv_cache_memory_bytes=num_blocks * block_bytes, max_num_batched_tokens=64) as llm:
        scheduler = llm._built.engine.scheduler
        scheduler.peak.fits = lambda request, sharing: True  # admit all: the pool overflows
        assert model.answers(llm) == model.expected
        assert scheduler.counters.num_preemptions > 0


@pytest.mark.parametrize("name", ["penstock-tiny, w8a8", "windowed, w8a8, int8 KV", "penstock-tiny, w4a8, int8 KV"])
def test_products_of_integers(name: str, tmp_path: Path) -> None:
    """Rows are rounded to 8 bits one by one: chunks, depth, threads, hits and who else runs change no token."""
    model = Model(name, tmp_path)
    chunks = {"max_num_batched_tokens": 7, "max_num_seqs": 7, "async_scheduling": "on", "num_threads": 2}
    with model.engine(**chunks) as llm:
        assert "quantize" in dict(llm._built.runner.model.seconds())  # the operation that makes integers
        assert model.answers(llm) == model.expected
    with model.engine(max_num_batched_tokens=50, max_num_seqs=1, num_threads=1) as llm:
        assert model.answers(llm) == model.expected
        assert model.answers(llm) == model.expected
        assert llm._built.engine.scheduler.counters.prefix_hits > 0
