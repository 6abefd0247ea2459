"""transformers' side: `model.generate` on equal prompts (no padding), at the fastest of several batch sizes.

Its continuous batching is not here: on a CPU it is slower than `generate` (benchmarks/throughput_vs_transformers.py
times both). Also the reference for token checks: `scores`.
"""

from __future__ import annotations

import time
from typing import Any

from worker import Settings, main

SMALL_S = 5.0  # works faster than this are tried at every batch size, slower ones at two


class Transformers:
    def __init__(self, settings: Settings) -> None:
        import torch
        import transformers

        if settings.variant != "bf16":
            raise ValueError(f"transformers has no {settings.variant} for CPUs")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(settings.threads)
        self._torch = torch
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(settings.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None, bos_token_id=None)
        self._model.generation_config = config
        self._batch_sizes: dict[tuple[int, int, int], int] = {}
        self.settings: dict[str, Any] = {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "attn_implementation": "sdpa",
            "batch_sizes": {},
        }

    def run(self, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
        key = (len(prompts), len(prompts[0]), num_output)
        if key not in self._batch_sizes:  # the harness does not time a work's first run
            self._batch_sizes[key] = self._choose(prompts, num_output)
            name = "{} x ({}, {})".format(*key)
            self.settings["batch_sizes"][name] = self._batch_sizes[key]
        return self._timed(prompts, num_output, self._batch_sizes[key])

    def _choose(self, prompts: list[list[int]], num_output: int) -> int:
        num = len(prompts)
        if num < 8:
            return num
        tried = {num: self._timed(prompts, num_output, num)[0]}
        for size in (num // 2, num // 4, num // 8) if tried[num] < SMALL_S else (num // 4,):
            tried[size] = self._timed(prompts, num_output, size)[0]
        return min(tried, key=tried.__getitem__)

    def _timed(self, prompts: list[list[int]], num_output: int, size: int) -> tuple[float, list[list[int]]]:
        torch = self._torch
        outputs: list[list[int]] = []
        begin = time.perf_counter()
        with torch.inference_mode():
            for at in range(0, len(prompts), size):
                ids = torch.tensor(prompts[at : at + size])
                made = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_output)
                outputs += made[:, ids.shape[1] :].tolist()
        return time.perf_counter() - begin, outputs

    def scores(self, token_ids: list[int], of: list[int]) -> dict[str, Any]:
        """Float32 scores of the token after `token_ids`: the best, and those of the tokens `of`."""
        with self._torch.inference_mode():
            found = self._model(self._torch.tensor([token_ids])).logits[0, -1].float()
        return {"best": float(found.max()), "of": [float(found[each]) for each in of]}

    def close(self) -> None:
        """Nothing runs between calls."""


if __name__ == "__main__":
    main(Transformers)
