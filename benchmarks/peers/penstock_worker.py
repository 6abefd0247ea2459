"""penstock's side: `LLM(...).generate`, defaults but for the room for KV, which is fixed for every engine.

A variant that ends in "c8" keeps keys and values in int8, as OpenVINO does by default.
"""

from __future__ import annotations

import time
from typing import Any

from worker import MAX_MODEL_LEN, MAX_NUM_SEQS, Settings, kv_cache_bytes, main, process_memory

ROOM = 1.05  # blocks are rounded up


class Penstock:
    def __init__(self, settings: Settings) -> None:
        import torch

        # What importing torch takes is no work of the engine's: the memory row is told without it.
        torch_rss_bytes = process_memory("VmRSS")
        import penstock

        self._params = penstock.SamplingParams
        weights = settings.variant.removesuffix("c8")
        chosen: dict[str, Any] = {
            "dtype": "bfloat16",
            "quantization": "none" if weights == "bf16" else weights,
            "kv_cache_dtype": "auto" if weights == settings.variant else "int8",
            "num_threads": settings.threads,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
            "kv_cache_memory_bytes": int(kv_cache_bytes(settings.model) * ROOM),
            "cpu_kernels": settings.option or "auto",
        }
        self._llm = penstock.LLM(settings.model, **chosen)
        versions = {"penstock": penstock.__version__, "torch": torch.__version__}
        self.settings = {"versions": versions, **chosen, "rss_after_torch_bytes": torch_rss_bytes}

    def run(self, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
        params = self._params(temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin, [output.outputs[0].token_ids for output in outputs]

    def close(self) -> None:
        self._llm.close()


if __name__ == "__main__":
    main(Penstock)
