"""Compressed-tensors checkpoints written from the format's definition alone: numpy, and none of our code.

A 4-bit element k of a row is bits [4 (k % 8), 4 (k % 8) + 4) of little-endian int32 word k // 8, an 8-bit one bits
[8 (k % 4), ...) of word k // 4; both have half their range added. Scales are [rows, groups].
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def args(bits: int, group: int | None = None, **changes: Any) -> dict[str, Any]:
    """`weights` of a config group, as llm-compressor writes them."""
    strategy = "channel" if group is None else "group"
    return {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group,
        "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    } | changes  # fmt: skip


TOKEN = args(8, strategy="token", dynamic=True, observer=None)


def group(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    } | changes


def quantization_config(stored: str, *groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{n}": each for n, each in enumerate(groups)},
        "ignore": ["lm_head"],
    } | changes


def words(integers: np.ndarray, bits: int) -> np.ndarray:
    per = 32 // bits
    raised = np.pad(integers + (1 << (bits - 1)), ((0, 0), (0, -integers.shape[1] % per))).astype(np.uint64)
    out = np.zeros((raised.shape[0], raised.shape[1] // per), np.uint64)
    for place in range(per):
        out |= raised[:, place::per] << np.uint64(bits * place)
    return out.astype(np.uint32).view(np.int32)


@dataclass
class Stored:
    """The tensors of a checkpoint, and what each module's weight is worth: float64 [rows, K], exact."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def module(
        self,
        name: str,
        rows: int,
        k: int,
        bits: int,
        size: int | None,
        *,
        packed: bool,
        scale: torch.dtype = torch.bfloat16,
    ) -> None:
        """Random integers over their whole range and scales of both signs."""
        half = 1 << (bits - 1)
        integers = self.random.integers(-half, half, (rows, k))
        groups = 1 if size is None else -(-k // size)
        scales = torch.from_numpy(
            self.random.uniform(0.01, 0.03, (rows, groups)) * self.random.choice([-1, 1], (rows, groups))
        )
        scales = scales.to(scale)
        per_column = np.repeat(scales.double().numpy(), size or k, axis=1)[:, :k]
        self.values[name] = integers * per_column
        if packed:
            self.tensors[f"{name}.weight_packed"] = torch.from_numpy(words(integers, bits))
            self.tensors[f"{name}.weight_shape"] = torch.tensor([rows, k])
        else:
            self.tensors[f"{name}.weight"] = torch.from_numpy(integers.astype(np.int8))
        self.tensors[f"{name}.weight_scale"] = scales

    def plain(self, name: str, *shape: int) -> None:
        values = torch.from_numpy(self.random.normal(0, 0.1, shape)).bfloat16()
        self.tensors[name] = values + 1 if name.endswith("norm.weight") else values
        self.values[name.removesuffix(".weight")] = self.tensors[name].double().numpy()


CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 203,
    "hidden_size": 256,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", group(args(4, 128))),
    "int4 in whole rows": ("pack-quantized", group(args(4))),
    "int4 in groups of 256": ("pack-quantized", group(args(4, 256, actorder="weight"))),
    "int8": ("pack-quantized", group(args(8))),
    "w8a8": ("int-quantized", group(args(8), TOKEN)),
    "w4a8": ("int-quantized", group(args(4, 128), TOKEN)),
    "naive": ("naive-quantized", group(args(8))),
    "int4 in groups of 32": ("pack-quantized", group(args(4, 32))),
    "int8 in groups of 128": ("pack-quantized", group(args(8, 128))),
}


def checkpoint(
    directory: Path, scheme: str, *, shards: int = 1, scale: torch.dtype = torch.bfloat16, **changes: Any
) -> Stored:
    """A model of two layers. Keys of `changes` that config.json knows change it, `quantization` its quantization."""
    stored_as, own = SCHEMES[scheme]
    quantization = quantization_config(stored_as, own) | changes.pop("quantization", {})
    config = CONFIG | changes | {"quantization_config": quantization}
    bits, size, packed = own["weights"]["num_bits"], own["weights"]["group_size"], stored_as == "pack-quantized"
    found = Stored()
    hidden, inter, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    found.plain("model.embed_tokens.weight", config["vocab_size"], hidden)
    found.plain("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        found.plain("lm_head.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found.plain(at + "input_layernorm.weight", hidden)
        found.plain(at + "post_attention_layernorm.weight", hidden)
        for name in ("q", "k"):
            found.plain(f"{at}self_attn.{name}_norm.weight", width)
        matrices = {"self_attn.q": (q, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
        matrices |= {"self_attn.o": (hidden, q), "mlp.gate": (inter, hidden), "mlp.up": (inter, hidden)}
        for name, (rows, k) in {**matrices, "mlp.down": (hidden, inter)}.items():
            if f"{at}{name}_proj" in quantization["ignore"]:
                found.plain(f"{at}{name}_proj.weight", rows, k)
            else:
                found.module(f"{at}{name}_proj", rows, k, bits, size, packed=packed, scale=scale)
    write(directory, config, found.tensors, shards)
    return found


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    where = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[number::shards]}, directory / file)
        where |= dict.fromkeys(names[number::shards], file)
    if shards > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
