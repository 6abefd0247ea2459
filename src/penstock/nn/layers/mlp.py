"""The gated feed-forward block (SwiGLU). Source: Shazeer 2020, "GLU Variants Improve Transformer"."""

from __future__ import annotations

from torch import Tensor, nn

from penstock.config.model import ModelConfig
from penstock.nn.doors import Buffer, Recorder
from penstock.nn.layers.linear import Linear


class GatedMlp(nn.Module):
    """x [T, hidden] to [T, hidden]; gate and up are one fused projection, in that order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)

    def record(self, to: Recorder, a: Buffer, x: Buffer) -> None:
        """x += forward(a)"""
        h = to.linear_silu_mul(a, self.gate_up.weight, self.gate_up.bias)
        to.linear_add(x, h, self.down.weight, self.down.bias)
