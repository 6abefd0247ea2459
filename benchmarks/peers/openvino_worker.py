"""OpenVINO GenAI's side: its continuous batching pipeline, prefix caching on, else its defaults (u8 KV cache in bf16).

`prepare` exports a variant with optimum-intel: bf16 weights as they are, int8 per channel, int4 symmetric in groups
of 128 (embedding and head in int8, its default).
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Settings, main

EXPORT = {
    "bf16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"],
}


def prepare(settings: Settings) -> None:
    command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino"]
    command += ["--model", str(settings.model), "--task", "text-generation-with-past", *EXPORT[settings.variant]]
    subprocess.run([*command, str(settings.prepared)], check=True)


class OpenVino:
    def __init__(self, settings: Settings) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._array, self._tensor, self._genai = numpy.array, openvino.Tensor, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = 256
        properties = {"INFERENCE_NUM_THREADS": settings.threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(settings.prepared, scheduler, "CPU", properties)
        names = ("openvino", "openvino-genai", "optimum-intel", "nncf")
        self.settings: dict[str, Any] = {
            "versions": {name: importlib.metadata.version(name) for name in names},
            "export": EXPORT[settings.variant],
            "enable_prefix_caching": True,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            **properties,
        }

    def run(self, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
        config = self._genai.GenerationConfig(max_new_tokens=num_output, ignore_eos=True, do_sample=False)
        begin = time.perf_counter()
        asked = [self._tensor(self._array([prompt], dtype="int64")) for prompt in prompts]
        outputs = self._pipeline.generate(asked, [config] * len(asked))
        elapsed_s = time.perf_counter() - begin
        return elapsed_s, [[int(each) for each in output.m_generation_ids[0]] for output in outputs]

    def close(self) -> None:
        """Ends with the process."""


if __name__ == "__main__":
    main(OpenVino, prepare)
