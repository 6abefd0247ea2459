"""The runner on a real tiny model: a request whose scores are not numbers fails alone, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.core.request import SamplingParams
from penstock.engine.client import RequestError
from penstock.llm import LLM
from penstock.nn.doors import Batch

POISON = 4000  # a token whose embedding is made NaN
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize("at", [3, 40, 75])
def test_a_poisoned_prompt_harms_nobody_else(at: int) -> None:
    """The bad token stands in the first, a middle or the last chunk; the small pool's blocks are used again at once."""
    prompts = [[n + 5 * i for n in range(60, 100)] for i in range(12)]
    settings = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "max_model_len": 96, "dtype": "float32"}
    with LLM(kv_cache_memory_bytes="2M", block_size=8, **settings) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
        model = llm._built.runner.model
        with torch.no_grad():
            model.embed.weight = torch.nn.Parameter(model.embed.weight.clone(), requires_grad=False)
            model.embed.weight[POISON] = float("nan")  # the head keeps its own, sound copy
        bad = [7] * 80
        bad[at] = POISON
        for _ in range(3):
            with pytest.raises(RequestError, match="not numbers"):
                llm.generate([bad], GREEDY, use_tqdm=False)
            llm.reset_prefix_cache()
            found = [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
            assert found == expected


def test_the_model_is_asked_for_what_is_read_alone() -> None:
    """The last token of each row, all of a prompt whose log probabilities are wanted; decodes name none."""
    prompts = [list(range(60, 100)), list(range(200, 270)), list(range(300, 310))]
    params = [SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=n, detokenize=False) for n in (None, None, 0)]
    seen: list[tuple[int, list[int] | None]] = []
    with LLM(max_num_batched_tokens=64, max_model_len=96, dtype="float32", kv_cache_memory_bytes="8M") as llm:
        model: Any = llm._built.runner.model

        class Spy:
            def __call__(self, batch: Batch) -> Any:
                seen.append((len(batch.token_ids), None if batch.outputs is None else batch.outputs.tolist()))
                return model(batch)

            def __getattr__(self, name: str) -> Any:
                return getattr(model, name)

        llm._built.runner.model = Spy()  # type: ignore[assignment]
        llm.generate(prompts, params, use_tqdm=False)
    assert seen[:2] == [(64, [39, 63]), (57, [0, 46, *range(47, 57)])]
    assert len(seen) > 4 and set(seen[2:]) <= {(n, None) for n in (1, 2, 3)}
