"""Attention with the plainest cache there is, for drawing text from a model while or after it is trained.

Knows tensors and shapes; nothing of blocks, requests or schedules, which is what the engine is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.config.model import ModelConfig


class LockstepCache:
    """Attention of B requests in lock step over a plain [B, H, S, D] cache: `PreparedAttention` for sampling."""

    def __init__(self, config: ModelConfig, num_rows: int, max_position: int = 0) -> None:
        """Room for `max_position` tokens per request; 0: for as many as the model reads."""
        shape = (num_rows, config.num_kv_heads, max_position or config.max_position, config.head_dim)
        self.k = [torch.zeros(shape) for _ in range(config.num_layers)]
        self.v = [torch.zeros(shape) for _ in range(config.num_layers)]
        self.position = 0

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One new token per request: q [B, Hq, D], k and v [B, Hkv, D]; result [B, Hq * D].

        The queries that share a KV head are passed as its G query positions, so the cache is never repeated.
        """
        end = self.position + 1
        self.k[layer][:, :, self.position] = k
        self.v[layer][:, :, self.position] = v
        grouped = q.view(k.shape[0], k.shape[1], -1, k.shape[2])
        keys, values = self.k[layer][:, :, :end], self.v[layer][:, :, :end]
        return torch.nn.functional.scaled_dot_product_attention(grouped, keys, values).reshape(q.shape[0], -1)

    def keep(self, rows: Tensor) -> None:
        """Drop the requests that are not in `rows` (int64 indices)."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]
