"""Every family, end to end: greedy tokens equal transformers', whatever the chunking, mixing, caching or preemption.

Exactness E1 (plain torch: a matrix product depends on the shape of its batch): tokens are equal up to the first
position where the two best scores lie within 1e-3; such positions must be rare, or they would hide a failure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock.core.request import SamplingParams
from penstock.llm import LLM

VOCAB, NUM_OUT, TIE = 8192, 64, 1e-3
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-mixed-windows": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "llama": (transformers.LlamaConfig, {}),
    "llama3-rope": (transformers.LlamaConfig, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 24}),
}


class Reference:
    """A tiny random model of a family, saved as a checkpoint, with transformers' own greedy answers."""

    def __init__(self, family: str, directory: Path) -> None:
        self.family = family
        kind, extra = FAMILIES[family]
        config = kind(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **extra,
        )
        torch.manual_seed(7)
        self.model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 3.0 if "embed" in name or "lm_head" in name else 1.5)
                    parameter.div_(parameter.shape[1] ** 0.5)
        self.model.save_pretrained(directory)
        self.directory = directory
        shared = torch.randint(1, VOCAB, (48,)).tolist()
        lengths = (3, 9, 17, 33, 40, 63, 80, 120)
        self.prompts = [
            (shared if i % 2 else []) + torch.randint(1, VOCAB, (n,)).tolist() for i, n in enumerate(lengths)
        ]
        self.tokens, self.gaps = zip(*map(self._greedy, self.prompts), strict=True)

    @torch.no_grad()
    def _greedy(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        ids = self.model.generate(torch.tensor([prompt]), max_new_tokens=NUM_OUT, do_sample=False)[0].tolist()
        logits = self.model(torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.std() >= 2, "the head must spread scores, or ties decide the test"
        best = logits.topk(2).values
        return ids[len(prompt) :], (best[:, 0] - best[:, 1]).tolist()

    def check(self, answers: list[list[int]]) -> None:
        num_ties = 0
        for ids, expected, gaps in zip(answers, self.tokens, self.gaps, strict=True):
            assert len(ids) == NUM_OUT
            for n in range(NUM_OUT):
                if gaps[n] < TIE:
                    num_ties += 1
                    break
                assert ids[n] == expected[n], f"token {n} differs, gap of the two best {gaps[n]:.4f}"
        assert num_ties <= 0.02 * NUM_OUT * len(answers)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp(request.param))


def answers(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NUM_OUT, ignore_eos=True, detokenize=False)
    return [r.outputs[0].token_ids for r in llm.generate(prompts, params, use_tqdm=False)]


def engine(reference: Reference, **settings: Any) -> LLM:
    return LLM(
        str(reference.directory),
        tokenizer="penstock-tiny",
        dtype="float32",
        block_size=8,
        **{"max_num_seqs": 8, "max_model_len": 256, "kv_cache_memory_bytes": "64M", **settings},
    )


@pytest.mark.parametrize("depth", ["off", "on"])
@pytest.mark.parametrize("step_tokens", [1, 7, 16, 2048])
def test_chunking_and_depth(reference: Reference, step_tokens: int, depth: str) -> None:
    """Any token budget, planned ahead or not; the second round runs on prefix hits and in another mix."""
    sizes = {"max_num_batched_tokens": step_tokens, "max_num_seqs": min(8, step_tokens)}
    with engine(reference, **sizes, async_scheduling=depth) as llm:
        reference.check(answers(llm, reference.prompts))
        if step_tokens >= 16:
            again = answers(llm, reference.prompts[::-1])
            reference.check(again[::-1])
            assert llm._built.engine.scheduler.counters.prefix_hits > 0


def test_without_prefix_cache_and_alone(reference: Reference) -> None:
    """No hits, and one request at a time."""
    with engine(reference, enable_prefix_caching=False, max_num_seqs=1) as llm:
        reference.check(answers(llm, reference.prompts))
        assert llm._built.engine.scheduler.counters.prefix_hits == 0


@pytest.mark.parametrize("depth", ["off", "on"])
def test_forced_preemption(reference: Reference, depth: str) -> None:
    """A pool that admission overrates: requests are preempted, recomputed, and nobody's tokens change."""
    block_bytes = 2 * 2 * 8 * 16 * 4 * 3  # K and V, heads, block, head size, float32, layers
    num_blocks = 16 if reference.family == "mistral" else 40  # a window holds little, so little must be there
    sizes = {"kv_cache_memory_bytes": num_blocks * block_bytes, "max_num_batched_tokens": 16}
    with engine(reference, **sizes, async_scheduling=depth) as llm:
        scheduler = llm._built.engine.scheduler
        scheduler.peak.fits = lambda request, sharing: True  # admit all: the pool overflows
        reference.check(answers(llm, reference.prompts))
        assert scheduler.counters.num_preemptions > 0
