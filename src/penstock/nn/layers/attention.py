"""Self-attention with grouped queries: projections, q/k norm, rope. The cache is behind `Batch.attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penstock.config.model import ModelConfig
from penstock.nn.doors import Batch, Buffer, Recorder
from penstock.nn.layers.linear import Linear
from penstock.nn.layers.norm import RMSNorm
from penstock.nn.layers.rotary import rotate


class SelfAttention(nn.Module):
    """x [T, hidden] to [T, hidden]. q, k and v are one fused projection, in that order."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            qk = torch.cat((q, k), 1)
        else:
            qk = heads[:, : self.num_heads + self.num_kv_heads]
        q, k = rotate(qk, cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        return self.out(batch.attention.run(self.layer, q, k, v))

    def record(self, to: Recorder, a: Buffer, x: Buffer, rotary: tuple[Tensor, Tensor]) -> None:
        """x += forward(a); rotary: cos and sin tables."""
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        qkv = to.linear(a, self.qkv.weight, self.qkv.bias)
        out = to.attend(self.layer, qkv, self.num_heads, norms, rotary)
        to.linear_add(x, out, self.out.weight, self.out.bias)
