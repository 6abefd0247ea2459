"""Matrices as small integers times bf16 scales, and the words that compressed-tensors packs them in.

Round to nearest is bit for bit what native kernels do to a plain checkpoint while it loads (native/src/pack.cpp), so
that a checkpoint made of it gives the same tokens (E0). Knows no calibration; that is gptq.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.nn.quant.rotation import rotate

_ELEMENTS_AT_ONCE = 1 << 23


@dataclass(frozen=True, slots=True)
class Grid:
    """What numbers may become. `group`: columns that share a scale; None: all of a row."""

    bits: int
    group: int | None

    @property
    def low(self) -> int:
        return -8 if self.bits == 4 else -127

    @property
    def high(self) -> int:
        return 7 if self.bits == 4 else 127

    def size(self, k: int) -> int:
        return self.group or k

    def groups(self, matrix: Tensor) -> Tensor:
        """[N, K] to [N, groups, columns of a group], zeros behind a last group that is short."""
        size = self.size(matrix.shape[1])
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size))
        return padded.view(matrix.shape[0], -1, size)


@dataclass(slots=True)
class Rounded:
    """integers: int8 [N, K]. scales: bf16 numbers as float32 [N, groups]."""

    grid: Grid
    integers: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """What they stand for, float32 [N, K]."""
        k = self.integers.shape[1]
        return self.integers.float() * self.scales.repeat_interleave(self.grid.size(k), 1)[:, :k]

    def rows(self, start: int, end: int) -> Rounded:
        return Rounded(self.grid, self.integers[start:end], self.scales[start:end])


def as_bf16(x: Tensor) -> Tensor:
    """The nearest bf16 numbers, as float32."""
    return x.bfloat16().float()


def extreme_scales(weight: Tensor, grid: Grid) -> Tensor:
    """Scales [N, groups] that just hold the element of largest magnitude. weight float32 [N, K].

    1 where all are 0, or so small (below 2^-119) that the inverse of their scale would overflow: they become 0.

    With 4 bits that element becomes -8, so that scales may be negative: integers reach -8 but only +7. The first of
    equal magnitudes decides.
    """
    groups = grid.groups(weight)
    magnitudes = groups.abs()
    most = magnitudes.amax(2, keepdim=True)
    if grid.bits == 8:
        scales = as_bf16(most / 127)
    else:
        first = (magnitudes == most).to(torch.uint8).argmax(2, keepdim=True)
        scales = as_bf16(groups.gather(2, first) / -8)
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 1.0, scales).squeeze(2)


def round_on(weight: Tensor, grid: Grid, scales: Tensor) -> Rounded:
    """weight float32 [N, K] to the nearest numbers of the grid with these scales."""
    groups = grid.groups(weight)
    integers = torch.round(groups * (1 / scales.unsqueeze(2))).clamp(grid.low, grid.high).to(torch.int8)
    return Rounded(grid, integers.view(weight.shape[0], -1)[:, : weight.shape[1]].contiguous(), scales)


def round_to_nearest(weight: Tensor, grid: Grid, rotation: int = 0) -> Rounded:
    """weight [N, K], rounded to bf16 first, as plain checkpoints are served. rotation: a block that is rotated then."""
    done = []
    for rows in _rows_of(weight):
        plain = as_bf16(rows)
        if rotation:
            plain = as_bf16(rotate(plain, rotation))
        done.append(round_on(plain, grid, extreme_scales(plain, grid)))
    return Rounded(grid, torch.cat([part.integers for part in done]), torch.cat([part.scales for part in done]))


def pack_words(integers: Tensor, bits: int) -> Tensor:
    """int8 [N, K] of 4 or 8 bits to int32 [N, ceil(K * bits / 32)]: elements + half the range, from the low bits up."""
    per_word, shifts, done = 32 // bits, torch.arange(0, 32, bits), []
    for rows in _rows_of(integers):
        raised = torch.nn.functional.pad(rows.to(torch.int64) + (1 << bits - 1), (0, -rows.shape[1] % per_word))
        words = (raised.view(len(rows), -1, per_word) << shifts).sum(2)
        done.append(torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32))
    return torch.cat(done)


def _rows_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """The matrix in pieces of whole rows: bounds what is copied on the way."""
    return matrix.split(max(_ELEMENTS_AT_ONCE // matrix.shape[1], 1))
