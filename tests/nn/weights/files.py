"""Checkpoint directories for tests: good ones from a tiny model, and single files written byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.config.model import ModelConfig, parse_model_config
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.create import init_dummy

INDEX = "model.safetensors.index.json"


def tiny_config(**changes: Any) -> ModelConfig:
    return parse_model_config(
        {
            "architectures": ["Qwen2ForCausalLM"],  # biases: parameters of one dimension inside fused ones
            "vocab_size": 97,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
    )


def dummy_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaModel:
    model = create_model(config, dtype)
    init_dummy(model, seed)
    return model


def tensors_of(model: LlamaModel) -> dict[str, Tensor]:
    """The model's parameters under their Hugging Face names; a tied head only once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for route in model_routes(model.config):
        if route.kind == "fill":
            whole = parameters[route.target]
            found[route.source] = whole if route.rows is None else whole[route.rows[0] : route.rows[1]].clone()
    return found


def save(directory: Path, tensors: dict[str, Tensor], num_shards: int = 1) -> None:
    """One `model.safetensors`, or shards with an index."""
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for n in range(num_shards):
        part = {name: tensors[name] for name in names[n::num_shards]}
        file = f"model-{n + 1:05}-of-{num_shards:05}.safetensors"
        save_file(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    write_index(directory, weight_map)


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def read_index(directory: Path) -> dict[str, str]:
    return json.loads((directory / INDEX).read_text())["weight_map"]


def write_raw(path: Path, header: Any, payload: bytes, length: int | None = None) -> Path:
    """A file with this header (text, bytes or a value for JSON), announced as `length` bytes long."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
