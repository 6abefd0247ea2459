"""The user's torch is left alone: its number of threads changes only while an engine in the process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock import LLM, SamplingParams
from penstock.nn.kernels.native import usable_kernels

SMALL = {"max_model_len": 128, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4, "num_threads": 2}


@pytest.mark.parametrize("scheduling", ["off", "on"])
@pytest.mark.parametrize(("kernels", "inside"), [("auto", 1), ("torch", 2)])
def test_threads_inside_and_outside(kernels: str, inside: int, scheduling: str) -> None:
    """One thread beside native kernels (OpenMP's workers would spin next to their team), else as configured."""
    if kernels == "auto" and not usable_kernels():
        pytest.skip("the native kernels were not built, or not for this machine")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with LLM("penstock-tiny", cpu_kernels=kernels, async_scheduling=scheduling, **SMALL) as llm:
            assert torch.get_num_threads() == 3
            seen: list[int] = []
            model: Any = llm._built.runner.model

            class Spy:
                def __call__(self, batch: Any) -> Any:
                    seen.append(torch.get_num_threads())
                    return model(batch)

                def scores_after(self, batch: Any) -> Any:
                    seen.append(torch.get_num_threads())
                    return model.scores_after(batch)

                def __getattr__(self, name: str) -> Any:
                    return getattr(model, name)

            llm._built.runner.model = Spy()
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True), use_tqdm=False)
            assert seen == [inside] * len(seen) and len(seen) >= 3
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
