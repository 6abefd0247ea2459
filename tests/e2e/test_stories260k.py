"""A real checkpoint of another project, converted, then run offline and over HTTP: what plain PyTorch said, again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.serving import RealServer

from penstock import LLM, SamplingParams, cli

pytestmark = pytest.mark.shared

PROMPTS = ("Once upon a time", "The little dog", "One day, Tom and Sam")
NUM_GREEDY = 48
TOLERANCE = 2e-4  # the reference is rounded to 4 decimals, a difference of two of them to 1e-4


@pytest.fixture(scope="module")
def source(shared_dir: Path) -> Path:
    return shared_dir / "data" / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def reference(source: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((source / "greedy_reference.json").read_text())["prompts"]
    assert set(told) == set(PROMPTS) and all(len(each["greedy_ids"]) == NUM_GREEDY for each in told.values())
    return told


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `penstock convert` makes of the checkpoint."""
    directory = tmp_path_factory.mktemp("stories260K") / "model"
    arguments = [str(source / "stories260K.bin"), "--tokenizer", str(source / "tok512.bin"), str(directory)]
    assert cli.main(["convert", "llama2c", *arguments]) == 0
    return directory


@pytest.fixture(scope="module")
def llm(converted: Path) -> Iterator[LLM]:
    with LLM(str(converted), dtype="float32", kv_cache_memory_bytes="16M") as loaded:
        yield loaded


def differences(top5: list[list[float]], logprobs: dict[int, float]) -> list[float]:
    """How far each of the five lies below the best: by the reference, minus by us."""
    best = int(top5[0][0])
    return [(logit - top5[0][1]) - (logprobs[int(i)] - logprobs[best]) for i, logit in top5]


def test_offline_gives_the_reference(llm: LLM, reference: dict[str, Any]) -> None:
    """All three prompts in one batch: token ids equal, the five best logits within the rounding of the reference."""
    params = SamplingParams(temperature=0, max_tokens=NUM_GREEDY, ignore_eos=True, logprobs=5)
    for prompt, output in zip(PROMPTS, llm.generate(list(PROMPTS), params, use_tqdm=False), strict=True):
        told = reference[prompt]
        assert output.prompt_token_ids == told["prompt_ids"]
        [sample] = output.outputs
        assert sample.token_ids == told["greedy_ids"]
        assert sample.logprobs is not None
        first = sample.logprobs[0]
        ours = {token_id: entry.logprob for token_id, entry in first.items()}
        assert list(ours) == [int(token_id) for token_id, _ in told["first_step_top5"]]
        assert max(map(abs, differences(told["first_step_top5"], ours))) <= TOLERANCE


def test_the_logits_themselves(llm: LLM, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only their differences: a constant on all of them would change no probability, and would be wrong."""
    model = llm._built.runner.model
    seen: list[Any] = []
    compute = model.logits

    def logits(hidden: Any) -> Any:
        seen.append(compute(hidden).clone())
        return seen[-1]

    monkeypatch.setattr(model, "logits", logits)
    for prompt in PROMPTS:
        seen.clear()
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        [row] = seen[-1]
        for token_id, logit in reference[prompt]["first_step_top5"]:
            assert float(row[token_id]) == pytest.approx(logit, abs=TOLERANCE)


def test_over_http_it_is_the_same(converted: Path, reference: dict[str, Any]) -> None:
    with RealServer("--dtype", "float32", "--kv-cache-memory-bytes", "16M", model=str(converted)) as server:
        server.until_ready()
        asked: dict[str, Any] = {"temperature": 0, "max_tokens": NUM_GREEDY, "ignore_eos": True, "logprobs": 5}
        for prompt in PROMPTS:
            told = reference[prompt]
            extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
            choice = server.complete(prompt, **asked, **extra)["choices"][0]
            assert choice["prompt_token_ids"] == told["prompt_ids"]
            assert choice["token_ids"] == told["greedy_ids"]
            top = {int(name.split(":")[1]): logprob for name, logprob in choice["logprobs"]["top_logprobs"][0].items()}
            assert max(map(abs, differences(told["first_step_top5"], top))) <= TOLERANCE
            assert " " + prompt + choice["text"] == told["text"]
