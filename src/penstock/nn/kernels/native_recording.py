"""A model's layers recorded as a native program: which projections there are, then the operations on packed weights.

Knows buffers and operations. Knows no step; how projections are packed is told by whoever packs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.config.model import KVLayout
from penstock.nn.doors import Buffer
from penstock.nn.quant.rotation import largest_rotation

KV_FORMATS = {"bfloat16": 0, "int8": 1}
F32, BF16 = 0, 1
COLUMNS = 16  # output columns of a packed block
_PLAIN, _GATED = 0, 1  # what a planned buffer holds


class Unsupported(Exception):
    """The model has something that native kernels cannot compute and plain torch can. Says what."""


class Packed(Protocol):
    """Projections that were packed."""

    def find(self, parameter: Tensor) -> Any | None:
        """The packed form; None for a parameter that is no projection."""
        ...


@dataclass(frozen=True, slots=True)
class Use:
    """How a parameter is packed. `interleaved`: halves of gate and up, in turns of one block each. `rotation`: columns
    of a block that is rotated before it is rounded, 0: none.
    """

    parameter: Tensor
    bias: Tensor | None
    format: str
    interleaved: bool = False
    rotation: int = 0


class Planner:
    """A Recorder that notes how each projection is used, and refuses shapes that native kernels cannot compute."""

    def __init__(self, uses: dict[int, Use], weight_format: str) -> None:
        self._uses = uses
        self._format = weight_format

    def embed(self, weight: Tensor) -> Buffer:
        return Buffer(_PLAIN, weight.shape[1])

    def rms_norm(self, x: Buffer, weight: Tensor, eps: float) -> Buffer:
        return x

    def linear(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        self._uses[id(weight)] = Use(weight, bias, self._format, rotation=self._rotation(a))
        return Buffer(_PLAIN, weight.shape[0])

    def linear_add(self, x: Buffer, a: Buffer, weight: Tensor, bias: Tensor | None) -> None:
        assert tuple(weight.shape) == (x.width, a.width)
        self._uses[id(weight)] = Use(weight, bias, self._format, rotation=self._rotation(a))

    def linear_silu_mul(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        width = weight.shape[0] // 2
        if width % COLUMNS:
            raise Unsupported(f"native kernels need a feed-forward width of a multiple of {COLUMNS}, not {width}")
        self._uses[id(weight)] = Use(weight, bias, self._format, interleaved=True, rotation=self._rotation(a))
        return Buffer(_GATED, width)

    def _rotation(self, a: Buffer) -> int:
        """Products of two projections have outliers that leave 8 bits too little for all else, other inputs have not:
        benchmarks/activation_rounding.py.
        """
        return largest_rotation(a.width) if a.number == _GATED and self._format in ("w8a8", "w4a8") else 0

    def attend(
        self,
        layer: int,
        qkv: Buffer,
        num_heads: int,
        norms: tuple[Tensor, Tensor, float] | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Buffer:
        return Buffer(_PLAIN, num_heads * 2 * rotary[0].shape[1])


class ProgramRecorder:
    """The Recorder of native programs. Buffers of one kind are shared by all layers."""

    def __init__(self, weights: Packed, program: Any, layout: KVLayout, pools: Sequence[Tensor]) -> None:
        self._weights = weights
        self._program = program
        self._buffers: dict[tuple[str, int], Buffer] = {}
        self.kept: list[Any] = []
        self._pools: dict[int, tuple[int, int]] = {}  # layer -> (pool of the program, head size)
        for group in layout.groups:
            for layer in group.layers:
                flat = pools[layer].view(torch.uint8).view(pools[layer].shape[0], -1).numpy()
                shape = group.num_kv_heads, group.head_dim, group.index, group.window or 0
                number = program.pool(flat, *shape, KV_FORMATS[group.dtype], layer)
                self._pools[layer] = (number, group.head_dim)
                self.kept.append(flat)

    def embed(self, weight: Tensor) -> Buffer:
        packed = self._weights.find(weight)
        width = weight.shape[1] if packed is None else packed.k
        x = Buffer(self._program.buffer(F32, width), width)
        if packed is None:
            self.kept.append(weight)
            self._program.embed_bf16(words(weight), x.number)
        else:  # the head's matrix: its rows are looked up in the packed form
            self._program.embed_packed(packed, x.number)
        return x

    def rms_norm(self, x: Buffer, weight: Tensor, eps: float) -> Buffer:
        to = self._buffer("norm", x.width)
        self._program.rms_norm(x.number, floats(weight), eps, to.number)
        return to

    def linear(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        packed = self._weights.find(weight)
        assert packed is not None
        to = self._buffer("linear", packed.n)
        self._program.linear(packed, a.number, to.number)
        return to

    def linear_add(self, x: Buffer, a: Buffer, weight: Tensor, bias: Tensor | None) -> None:
        self._program.linear_add(self._weights.find(weight), a.number, x.number)

    def linear_silu_mul(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        packed = self._weights.find(weight)
        assert packed is not None
        to = self._buffer("gated", packed.n // 2)
        self._program.linear_silu_mul(packed, a.number, to.number)
        return to

    def attend(
        self,
        layer: int,
        qkv: Buffer,
        num_heads: int,
        norms: tuple[Tensor, Tensor, float] | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Buffer:
        pool, dim = self._pools[layer]
        q_norm, k_norm, eps = (None, None, 0.0) if norms is None else (floats(norms[0]), floats(norms[1]), norms[2])
        cos, sin = (table.numpy() for table in rotary)
        self.kept += rotary
        self._program.heads(qkv.number, num_heads, pool, q_norm, k_norm, eps, cos, sin)
        to = self._buffer("attention", num_heads * dim)
        self._program.attend(qkv.number, num_heads, pool, math.log2(math.e) / math.sqrt(dim), to.number)
        return to

    def _buffer(self, kind: str, width: int) -> Buffer:
        if (kind, width) not in self._buffers:
            self._buffers[kind, width] = Buffer(self._program.buffer(BF16, width), width)
        return self._buffers[kind, width]


def interleaved(fused: Tensor) -> Tensor:
    """Rows of gate and up, in turns of one packed block each."""
    blocks = fused.detach().view(2, -1, COLUMNS, *fused.shape[1:])
    return blocks.transpose(0, 1).reshape(fused.shape)


def words(tensor: Tensor) -> np.ndarray:
    """A bf16 tensor's memory as uint16."""
    return tensor.detach().view(torch.uint16).numpy()


def floats(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()
