"""A projection: weight and optional bias, uninitialised. Whoever builds a model fills it: a checkpoint, or a trainer.

torch.nn.Linear would draw random numbers first, and on the meta device import torch's compiler for it (seconds).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """x [..., num_in] to [..., num_out]. weight [num_out, num_in], bias [num_out] or None (zeros when built)."""

    def __init__(self, num_in: int, num_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)
