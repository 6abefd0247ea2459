"""Columns of a matrix and of its inputs turned by Hadamard matrices before both are rounded: their product stays, and
an outlier among the inputs becomes a little of many.

Bit for bit what native kernels do (native/src/pack.cpp). Knows matrices; no model. Sources: Ashkboos et al. 2024,
"QuaRot" (the transform in front of the down projection); Sylvester's order of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.config.quantization import ROTATIONS


def largest_rotation(k: int) -> int:
    """The largest block, of at most 128 columns, that divides k columns; 0 where none of 16 or more does."""
    return next((size for size in reversed(ROTATIONS) if k % size == 0), 0)


def hadamard(size: int) -> Tensor:
    """The matrix in Sylvester's order, 1 and -1, float32 [size, size]. size: a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def rotate(x: Tensor, block: int) -> Tensor:
    """x float32 [..., K] times the Hadamard matrix of `block` columns over its root, in blocks. Its own inverse."""
    y = x
    for half in (1 << bit for bit in range(block.bit_length() - 1)):
        pairs = y.reshape(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = pairs.new_empty(pairs.shape)
        y[..., 0, :], y[..., 1, :] = a + b, a - b
    return y.reshape(x.shape) * (1 / torch.tensor(float(block)).sqrt())
