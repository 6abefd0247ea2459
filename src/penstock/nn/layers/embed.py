"""The token table, uninitialised like every layer here (see layers/linear.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Embedding(nn.Module):
    """token_ids [T] int64 to [T, size]. weight [num_tokens, size]."""

    def __init__(self, num_tokens: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, size))

    def forward(self, token_ids: Tensor) -> Tensor:
        return nn.functional.embedding(token_ids, self.weight)
