"""GPTQ: rounds a matrix column by column and lets the columns still to come make up for what rounding did.

Minimises the mean of |x (W - Q)^T|^2 over integers for a layer's inputs x, of which it only needs the mean of x x^T,
the Hessian. Scales are searched before, weighted by each column's energy; columns go in falling order of energy inside
groups that stay where they are, so that a checkpoint needs no g_idx (llm-compressor's actorder "weight"). Afterwards
every integer is looked at again, now that all others are known. Knows matrices, no model. Sources: Frantar et al. 2023,
"GPTQ"; Behdin et al. 2023, "QuantEase" (the second look).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.nn.quant.rounding import Grid, Rounded, as_bf16, extreme_scales

DAMPING = 0.01  # of the Hessian's mean diagonal
# Of the scale that just holds the extreme: cutting it makes all steps finer, and what is cut is made up for.
SHRINKS = tuple(0.6 + 0.025 * step for step in range(19))
SECOND_LOOKS = 2  # over all columns; more change little
_BLOCK = 128  # columns whose errors are passed on together


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Rounded, float]:
    """weight float32 [N, K], hessian float32 [K, K]: (the rounded matrix, the relative squared error of its outputs).

    Columns that no input ever touched are rounded to nearest. Raises torch.linalg.LinAlgError for a Hessian with values
    that are not finite.
    """
    k = weight.shape[1]
    energy = hessian.diagonal()
    scales = search_scales(weight, energy, grid)
    order = torch.argsort(energy, descending=True, stable=True)
    column_scales = scales[:, torch.arange(k) // grid.size(k)][:, order]
    left = weight[:, order].clone()
    damped = hessian.clone()
    mean = energy.mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    upper = _factor(damped[order][:, order])
    integers = torch.empty_like(left)
    for first in range(0, k, _BLOCK):
        last = min(first + _BLOCK, k)
        block, factor = left[:, first:last], upper[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            scale = column_scales[:, first + i]
            rounded = torch.round(block[:, i] / scale).clamp(grid.low, grid.high)
            integers[:, first + i] = rounded
            errors[:, i] = (block[:, i] - rounded * scale) / factor[i, i]
            block[:, i + 1 :] -= torch.outer(errors[:, i], factor[i, i + 1 :])
        left[:, last:] -= errors @ upper[first:last, last:]
    done = Rounded(grid, integers[:, torch.argsort(order)].to(torch.int8), scales)
    for _ in range(SECOND_LOOKS):
        _look_again(weight, damped, done)
    lost = done.values() - weight
    whole = float(((weight @ hessian) * weight).sum())
    return done, float(((lost @ hessian) * lost).sum()) / whole if whole > 0 else 0.0


def search_scales(weight: Tensor, energy: Tensor, grid: Grid) -> Tensor:
    """Scales [N, groups] with the least squared error of round to nearest, columns weighted by `energy` [K]."""
    groups, weights = grid.groups(weight), grid.groups(energy[None])
    extreme = extreme_scales(weight, grid)
    best, chosen = torch.full_like(extreme, torch.inf), extreme
    for shrink in (1.0, *SHRINKS):
        for sign in (1, -1) if grid.bits == 4 else (1,):
            scales = as_bf16(extreme * (sign * shrink))
            steps = scales.unsqueeze(2)
            rounded = torch.round(groups / steps).clamp_(grid.low, grid.high).mul_(steps)
            error = rounded.sub_(groups).square_().mul_(weights).sum(2)
            better = error < best
            best, chosen = torch.where(better, error, best), torch.where(better, scales, chosen)
    return chosen


def _look_again(weight: Tensor, hessian: Tensor, done: Rounded) -> None:
    """Every integer in turn to the best it can be beside all others, which never makes the error larger."""
    grid, k = done.grid, weight.shape[1]
    column_scales = done.scales[:, torch.arange(k) // grid.size(k)]
    values = done.values()
    slope = (weight - values) @ hessian
    for first in range(0, k, _BLOCK):
        last = min(first + _BLOCK, k)
        moves = torch.zeros(weight.shape[0], last - first)
        for i in range(first, last):
            scale = column_scales[:, i]
            best = torch.round((values[:, i] + slope[:, i] / hessian[i, i]) / scale).clamp(grid.low, grid.high)
            moves[:, i - first] = best * scale - values[:, i]
            done.integers[:, i] = best.to(torch.int8)
            slope[:, i + 1 : last] -= torch.outer(moves[:, i - first], hessian[i, i + 1 : last])
        slope[:, last:] -= moves @ hessian[first:last, last:]


def _factor(damped: Tensor) -> Tensor:
    """Upper Cholesky factor of a Hessian's inverse, computed in float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    return torch.linalg.cholesky(inverse, upper=True).float()
