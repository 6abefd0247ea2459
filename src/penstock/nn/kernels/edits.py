"""What the rows of a batch ask of the choice of their tokens: filters and noise, and how scores change before these
are applied: biases, allowed and banned ids, penalties.

Flat lists instead of objects per row, so that one operation serves all rows. Knows rows, not requests or reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class RowParams:
    """What each of N rows asks for; arrays of length N, contiguous. Values off: top_k 0, top_p 1, min_p 0."""

    temperature: NDArray[np.float32]
    top_k: Ids
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seeds: NDArray[np.uint64]
    positions: Ids  # absolute, of the token being chosen

    def take(self, rows: Ids) -> RowParams:
        return RowParams(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Ragged:
    """Token ids of N rows, one behind the other: row r has ids[starts[r] : starts[r + 1]]. Each id once per row."""

    starts: Ids
    ids: Ids

    @classmethod
    def of(cls, rows: Sequence[Ids]) -> Ragged:
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return cls(starts, np.concatenate(rows) if starts[-1] else NO_IDS)

    def places(self, size: int) -> Ids:
        """The ids as places in a flat [N, size] matrix."""
        return np.repeat(np.arange(len(self.starts) - 1) * size, np.diff(self.starts)) + self.ids


@dataclass(frozen=True, slots=True)
class RowEdits:
    """Edits of N rows, done in this order; all ids lie inside the vocabulary.

    bias and counts belong to the ids of `biased` and `occurred`. limited [N]: only `allowed` tokens stay possible.
    counts: occurrences in the output, 0 for a token of the prompt alone. penalties [N, 3]: repetition, frequency,
    presence (see `penalise`).
    """

    biased: Ragged
    bias: Floats
    limited: NDArray[np.bool_]
    allowed: Ragged
    banned: Ragged
    occurred: Ragged
    counts: Floats
    penalties: Floats

    def apply(self, scores: Tensor) -> None:
        """Edit scores float32 [N, V], contiguous, in place, on any device. The reference of the native kernel."""
        flat, size = scores.view(-1), scores.shape[1]

        def on_device(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(scores.device)

        if len(self.biased.ids):
            flat[on_device(self.biased.places(size))] += on_device(self.bias)
        if self.limited.any():
            allowed = on_device(self.allowed.places(size))
            kept = flat[allowed]
            scores[on_device(np.flatnonzero(self.limited))] = -torch.inf
            flat[allowed] = kept
        if len(self.banned.ids):
            flat[on_device(self.banned.places(size))] = -torch.inf
        if len(self.occurred.ids):
            factors = np.repeat(self.penalties, np.diff(self.occurred.starts), axis=0).T
            at = on_device(self.occurred.places(size))
            flat[at] = penalise(flat[at], *(on_device(np.ascontiguousarray(a)) for a in (self.counts, *factors)))


def penalise(
    scores: Tensor, counts: Tensor, repetition: Tensor | float, frequency: Tensor | float, presence: Tensor | float
) -> Tensor:
    """Scores [M] of tokens that occurred: `counts` [M] times in the output (0: in the prompt alone), penalised.

    `repetition` divides a positive score and multiplies another; then `frequency * counts` is taken off, and `presence`
    where the count is not 0. Source: Keskar et al. 2019 (CTRL), section 4.1; the OpenAI API; vLLM's order.
    """
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    return scores - frequency * counts - presence * (counts > 0)
