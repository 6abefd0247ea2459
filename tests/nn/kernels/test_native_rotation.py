"""Rotated columns: weights and rows of natively rotated products beside `nn.quant.rotation` and plain integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.nn.kernels.native import FORMATS, load_native, usable_kernels, words
from penstock.nn.quant.rotation import rotate
from penstock.nn.quant.rounding import Grid, as_bf16, round_to_nearest

if not usable_kernels():
    pytest.skip("the native kernels are not here", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = usable_kernels()
BLOCKS = [16, 32, 64, 128]
GRIDS = {"w8a8": Grid(8, None), "w4a8": Grid(4, 128)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def packed(weight_format: str, w: torch.Tensor, block: int) -> Any:
    native = load_native()
    weight = native.PackedWeight(FORMATS[weight_format], *w.shape, None, block)
    weight.fill(native.Team(2, []), 0, words(w))
    return weight


def product(kernels: str, weight: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    native, out = load_native(), torch.zeros(len(x), n)
    native.Program(kernels, native.Team(2, []), max(len(x), 1)).head(weight, words(x), out.numpy())
    return out


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    blocks=st.integers(1, 9),
    block=st.sampled_from(BLOCKS),
    scheme=st.sampled_from(sorted(GRIDS)),
    seed=st.integers(0, 1 << 20),
)
def test_weights_are_rotated_and_then_rounded_bit_for_bit(
    n: int, blocks: int, block: int, scheme: str, seed: int
) -> None:
    w = draw(n, blocks * block, seed=seed)
    found = torch.empty(w.shape)
    packed(scheme, w, block).unpack(found.numpy())
    rounded = round_to_nearest(rotate(w.float(), block), GRIDS[scheme])
    assert torch.equal(found, rotate(rounded.values(), block))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 9),
    block=st.sampled_from(BLOCKS),
    kernels=st.sampled_from(KERNELS),
    seed=st.integers(0, 1 << 20),
)
def test_rows_are_rotated_and_then_rounded_to_exact_integers(
    rows: int, blocks: int, block: int, kernels: str, seed: int
) -> None:
    w, x = draw(24, blocks * block, seed=seed), draw(rows, blocks * block, seed=seed + 1)
    weights = round_to_nearest(rotate(w.float(), block), GRIDS["w8a8"])
    turned = as_bf16(rotate(x.float(), block))
    scale = turned.abs().amax(1, keepdim=True) / 127
    integers = torch.round(turned * (1 / scale))
    sums = integers.double() @ weights.integers.double().T  # whole numbers, exact
    expected = (sums * scale.double() * weights.scales.double().T).float()
    assert torch.allclose(product(kernels, packed("w8a8", w, block), x, 24), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", sorted(GRIDS))
@pytest.mark.parametrize("block", BLOCKS)
def test_every_instruction_set_rotates_to_the_same_bits(block: int, scheme: str) -> None:
    weight, x = packed(scheme, draw(50, 6 * block), block), draw(9, 6 * block, seed=1)
    found = [product(kernels, weight, x, 50) for kernels in KERNELS]
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_outlier_does_not_cost_the_others_their_bits(kernels: str) -> None:
    w, x = draw(64, 512), draw(8, 512, seed=1)
    x[:, 77] *= 60
    exact = x.float() @ w.float().T
    lost = [(product(kernels, packed("w8a8", w, block), x, 64) - exact).norm() / exact.norm() for block in (0, 128)]
    assert lost[1] < lost[0] / 3


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none_and_in_its_row(kernels: str, broken: float) -> None:
    weight, x = packed("w8a8", draw(16, 256), 128), draw(3, 256, seed=1)
    expected = product(kernels, weight, x, 16)
    x[1, 200] = broken
    found = product(kernels, weight, x, 16)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(
    ("weight_format", "k", "block"), [("bf16", 128, 128), ("int8", 128, 64), ("w8a8", 96, 64), ("w8a8", 480, 48)]
)
def test_rotations_that_cannot_be_are_refused(weight_format: str, k: int, block: int) -> None:
    with pytest.raises(ValueError, match="rotated in whole blocks"):
        load_native().PackedWeight(FORMATS[weight_format], 16, k, None, block)


def test_a_weight_that_is_no_number_is_refused() -> None:
    w = draw(16, 128)
    w[3, 5] = torch.nan
    with pytest.raises(ValueError, match="not a finite number"):
        packed("w8a8", w, 64)
