"""Synthetic checkpoints of real shape: random bf16 weights as a Hugging Face directory that every engine reads.

    A  the shape of Qwen3-0.6B: 596 M parameters
    B  the shape of the built-in model: 12.6 M parameters

Random weights show speed, never quality. The embedding (which is the head, too) is scaled so that scores have a
standard deviation of about 2: then the best two tokens rarely lie so close that rounding decides, and tokens can be
compared. The tokenizer is the built-in model's for both: prompts are token ids, engines only want to see one.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[2] / "src" / "penstock" / "assets" / "penstock-tiny"
A_SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
SCORE_STD = 2.0


def checkpoint(name: str, workdir: Path) -> Path:
    """The directory of "A" or "B", written if it is not there."""
    directory = workdir / "checkpoints" / name
    if not (directory / "model.safetensors").exists():
        print(f"writing checkpoint {name}", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        config = json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))
        config |= A_SHAPE if name == "A" else {}
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(ASSETS / file, directory / file)
        _write_weights(config, directory / "model.safetensors")
    return directory


def num_parameters(config: dict[str, Any]) -> int:
    """Of the matrices a decode step reads once: all layers, and the head that is the embedding too."""
    matrices = [(config["vocab_size"], config["hidden_size"])]
    matrices += [shape for _, shape in _layer_matrices(config)] * config["num_hidden_layers"]
    return sum(rows * columns for rows, columns in matrices)


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    """In bf16."""
    return int(4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])


def _layer_matrices(config: dict[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    return [
        ("self_attn.q_proj", (query, hidden)),
        ("self_attn.k_proj", (key, hidden)),
        ("self_attn.v_proj", (key, hidden)),
        ("self_attn.o_proj", (hidden, query)),
        ("mlp.gate_proj", (inner, hidden)),
        ("mlp.up_proj", (inner, hidden)),
        ("mlp.down_proj", (hidden, inner)),
    ]


def _write_weights(config: dict[str, Any], path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, int], std: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)

    hidden, head_dim = config["hidden_size"], config["head_dim"]
    tensors = {
        "model.embed_tokens.weight": random((config["vocab_size"], hidden), SCORE_STD / math.sqrt(hidden)),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in _layer_matrices(config):
            tensors[f"{prefix}{name}.weight"] = random(shape, 1 / math.sqrt(shape[1]))
        for name, size in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", head_dim),
            ("self_attn.k_norm", head_dim),
        ):
            tensors[f"{prefix}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
