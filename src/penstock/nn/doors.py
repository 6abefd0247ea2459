"""The doors of `nn`: what a forward pass may read, and how attention is plugged in.

Tensor-typed protocols live here because `core/doors.py` must import no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(slots=True)
class Spans:
    """Where the rows of one step lie, as int32 numpy arrays. R rows, T tokens in all; rows stand one behind the other.

    query_start [R+1]: row r owns tokens [query_start[r], query_start[r+1]) of the batch.
    start [R]: position of the row's first token in its request; its context is start + num_tokens long.
    block_tables, per KV group [R, max_blocks]: physical block ids; entry 0 (the null block) where nothing is needed.
    """

    query_start: np.ndarray
    start: np.ndarray
    block_tables: tuple[np.ndarray, ...]


class PreparedAttention(Protocol):
    """Attention of one step, ready to be run once per layer."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v into the cache and attend. q [T, Hq, D], k and v [T, Hkv, D]; result [T, Hq * D]."""
        ...


class AttentionBackend(Protocol):
    """Owns nothing: reads and writes the KV pool it was given."""

    def prepare(self, spans: Spans) -> PreparedAttention: ...


@dataclass(slots=True)
class Batch:
    """What one forward may read. token_ids and positions: int64 [T]."""

    token_ids: Tensor
    positions: Tensor
    attention: PreparedAttention
