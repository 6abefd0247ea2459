"""The doors of `nn`: what a forward pass may read, and how attention is plugged in.

Tensor-typed protocols live here because `core/doors.py` must import no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from penstock.nn.kernels.edits import Ids, RowEdits, RowParams
from penstock.nn.words import StepWords


@dataclass(slots=True)
class Spans:
    """Where the rows of one step lie, as numpy arrays. R rows, T tokens in all; rows stand one behind the other.

    query_start, int64 [R+1]: row r owns tokens [query_start[r], query_start[r+1]) of the batch.
    start, int64 [R]: position of the row's first token in its request; its context is start + num_tokens long.
    block_tables, per KV group int32 [R, max_blocks]: physical ids; entry 0 (the null block) where nothing is needed.
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

    def prepare(self, spans: Spans, words: StepWords | None = None) -> PreparedAttention:
        """`words`: to be told of each layer's KV once it is written, and to be waited on before it is read."""
        ...


@dataclass(slots=True)
class Batch:
    """What one forward may read. token_ids and positions: int64 [T].

    outputs, int64 [N], ascending: the tokens of the batch whose hidden states somebody reads; None: all of them. A
    model gives these states [N, hidden], in this order. Keys and values are written for every token.
    """

    token_ids: Tensor
    positions: Tensor
    attention: PreparedAttention
    outputs: Tensor | None = None


class Scores(Protocol):
    """Scores of N rows for the next token. They may be computed only when somebody chooses from them, once."""

    def choose(self, params: RowParams, edits: RowEdits | None, reported: Ids) -> tuple[Ids, Tensor]:
        """The token of each row, int64 [N], NOT_A_NUMBER or NO_TOKEN where there is none; and the scores of the
        rows `reported` [M] before edits, float32 [M, V]. See `kernels/sampling.py` for what is chosen."""
        ...


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations of a recorded program: rows of `width` values, one per token of a step."""

    number: int
    width: int


class Recorder(Protocol):
    """What `record` of a layer speaks to: the operations of a step, told once and in order, run as a whole later.

    Streams (`embed`) are float32 and are added to; everything else is bf16 and valid until its kind is made again.
    """

    def embed(self, weight: Tensor) -> Buffer:
        """Rows of `weight` [tokens, width]: a new stream."""
        ...

    def rms_norm(self, x: Buffer, weight: Tensor, eps: float) -> Buffer: ...

    def linear(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        """a W^T + bias; weight [num_out, num_in]."""
        ...

    def linear_add(self, x: Buffer, a: Buffer, weight: Tensor, bias: Tensor | None) -> None:
        """x += a W^T + bias"""
        ...

    def linear_silu_mul(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        """silu(gate) * up of a fused projection, gate first."""
        ...

    def attend(
        self,
        layer: int,
        qkv: Buffer,
        num_heads: int,
        norms: tuple[Tensor, Tensor, float] | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Buffer:
        """Heads of q, k and v to those of the result: norms (q, k, eps), rope by (cos, sin), cache, attention.

        rotary: float32 [positions, D / 2] each.
        """
        ...
