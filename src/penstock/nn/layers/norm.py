"""RMSNorm. Knows nothing of the model around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penstock.nn.doors import Buffer, Recorder


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis; the sum is in float32.

    Shapes: x [..., D], weight [D], result as x, in the dtype of x.
    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale. x [..., size] to the same shape and dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def record(self, to: Recorder, x: Buffer) -> Buffer:
        return to.rms_norm(x, self.weight, self.eps)
