"""A native model of a tiny random configuration, stepped by hand, and the shapes that tests of it go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from penstock.config.model import ModelConfig, kv_layout, parse_model_config
from penstock.nn.doors import Batch, Spans
from penstock.nn.kernels.native import NativeAttention, NativeModel, PackedWeights, packed_layout
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.create import allocate_model, init_dummy
from penstock.runner.kv_store import KVStore

SIZE = 32  # tokens of a block
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 203,
    "hidden_size": 72,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MISTRAL = {**QWEN3, "architectures": ["MistralForCausalLM"], "sliding_window": 40, "tie_word_embeddings": False}
QWEN2 = {**QWEN3, "architectures": ["Qwen2ForCausalLM"]}
SHAPES = {
    "qwen3": QWEN3,
    "qwen3 heads of 64": {**QWEN3, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3 heads of 80": {**QWEN3, "head_dim": 80},
    "qwen3 heads of 96": {**QWEN3, "head_dim": 96},
    "qwen3 heads of 128": {**QWEN3, "head_dim": 128, "hidden_size": 128},
    "qwen3 heads of 192": {**QWEN3, "head_dim": 192},
    "qwen3 heads of 256": {**QWEN3, "head_dim": 256, "num_attention_heads": 1, "num_key_value_heads": 1},
    "llama, groups of 3": {
        **QWEN3,
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "llama with biases": {
        **QWEN3,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral with a window": MISTRAL,
    "qwen2, all heads alone": {**QWEN2, "num_key_value_heads": 4},
    "qwen2, one KV head for all": {**QWEN2, "num_key_value_heads": 1},
}


def torch_model(
    raw: dict[str, Any], dtype: torch.dtype, family: type[LlamaModel] = LlamaModel
) -> tuple[ModelConfig, LlamaModel]:
    config = parse_model_config(raw)
    model = allocate_model(lambda: family(config), dtype, "cpu")
    init_dummy(model, 0)
    return config, model


@dataclass
class Native:
    """A native model with its cache, and requests that own every third block of it."""

    config: ModelConfig
    model: NativeModel
    pools: list[torch.Tensor]

    def step(self, rows: list[tuple[int, int, np.ndarray]], outputs: list[int] | None = None) -> torch.Tensor:
        """Rows are (request, start, token ids); hidden states of all tokens, or of those that are asked for."""
        nums = [len(ids) for _, _, ids in rows]
        starts = np.array([start for _, start, _ in rows])
        width = max(-(-(start + len(ids)) // SIZE) for _, start, ids in rows)
        table = np.array([[1 + request + 3 * block for block in range(width)] for request, _, _ in rows], np.int32)
        spans = Spans(np.cumsum([0, *nums]), starts, (table,) * len(self.groups()))
        tokens = torch.from_numpy(np.concatenate([ids for _, _, ids in rows]).astype(np.int64))
        positions = torch.from_numpy(np.concatenate([np.arange(s, s + n) for s, n in zip(starts, nums, strict=True)]))
        wanted = None if outputs is None else torch.tensor(outputs, dtype=torch.int64)
        return self.model(Batch(tokens, positions, NativeAttention().prepare(spans), wanted))

    def groups(self) -> set[int | None]:
        return set(self.config.layer_windows)


def native(
    raw: dict[str, Any],
    kernels: str,
    *,
    num_threads: int = 2,
    length: int = 256,
    formats: tuple[str, str] = ("bf16", "bf16"),
    kv_dtype: str = "bfloat16",
    family: type[LlamaModel] = LlamaModel,
) -> Native:
    config, model = torch_model(raw, torch.bfloat16, family)
    layout = packed_layout(kv_layout(config, SIZE, kv_dtype))
    num_blocks = 1 + 3 * -(-length // SIZE)
    pools = KVStore(layout, (num_blocks,) * len(layout.groups), torch.device("cpu")).pools
    weights = PackedWeights(model, num_threads, formats)
    ours = NativeModel(model, weights, layout, pools, kernels=kernels, max_tokens=3 * length)
    return Native(config, ours, pools)


def prompts(config: ModelConfig, *lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(len(lengths))
    return [random.integers(0, config.vocab_size, length) for length in lengths]
