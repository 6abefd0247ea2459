"""Rounding: the bits that kernels make while loading, the words of the format, and what calibration gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.weights.compressed import words

from penstock.nn.kernels.native import FORMATS, load_native, usable_kernels
from penstock.nn.quant.gptq import gptq, search_scales
from penstock.nn.quant.rounding import Grid, as_bf16, extreme_scales, pack_words, round_on, round_to_nearest
from penstock.nn.weights.quantized import unpack_nibbles

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(n: int, k: int, seed: int) -> torch.Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    w[0] = 0.0
    w[-1, : k // 2] = 3.0  # equal magnitudes: the first decides
    w[-1, k // 2 :] = -3.0
    return w


@pytest.mark.skipif(not usable_kernels(), reason="the native kernels were not built, or not for this machine")
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 300), bits=st.sampled_from([4, 8]), seed=st.integers(0, 1 << 20))
def test_round_to_nearest_is_what_loading_does(n: int, k: int, bits: int, seed: int) -> None:
    w = drawn(n, k, seed)
    weight = load_native().PackedWeight(FORMATS[f"int{bits}"], n, k)
    weight.fill(load_native().Team(1, []), 0, w.bfloat16().view(torch.uint16).numpy())
    values = torch.empty(n, k)
    weight.unpack(values.numpy())
    ours = round_to_nearest(w, Grid(bits, 128 if bits == 4 else None))
    assert torch.equal(ours.values(), values)
    assert torch.equal(ours.scales, as_bf16(ours.scales))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 70), bits=st.sampled_from([4, 8]), seed=st.integers(0, 1 << 20))
def test_words_are_those_of_the_format(n: int, k: int, bits: int, seed: int) -> None:
    """Beside words written from the definition; elements of a last word that are none are not compared."""
    half = 1 << (bits - 1)
    integers = np.random.default_rng(seed).integers(-half, half, (n, k)).astype(np.int8)
    packed = pack_words(torch.from_numpy(integers), bits).numpy()
    full = k * bits // 32
    assert packed.shape == (n, -(-k * bits // 32))
    assert np.array_equal(packed[:, :full], words(integers.astype(np.int64), bits)[:, :full])
    if bits == 4:
        assert np.array_equal(unpack_nibbles(packed.view(np.uint8), k), integers)


def inputs(k: int, seed: int) -> torch.Tensor:
    """A few directions hold most of the energy, as activations have it."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=draw) * torch.logspace(0, -2, k)[:, None]
    return torch.randn(4 * k, k, generator=draw) @ mixing


@pytest.mark.parametrize("grid", [Grid(4, 128), Grid(4, None), Grid(8, None)])
def test_calibration_loses_less_of_the_outputs(grid: Grid) -> None:
    w, x = drawn(48, 200, 1), inputs(200, 2)
    hessian = x.T @ x / len(x)

    def lost(values: torch.Tensor) -> float:
        return float(((values - w) @ x.T).square().sum() / (w @ x.T).square().sum())

    found, error = gptq(w, hessian, grid)
    searched = round_on(w, grid, search_scales(w, hessian.diagonal(), grid))
    nearest = round_to_nearest(w, grid)
    assert lost(found.values()) < 0.6 * lost(searched.values())
    assert lost(searched.values()) <= 1.01 * lost(nearest.values())
    assert error == pytest.approx(lost(found.values()), rel=1e-3)
    assert torch.equal(found.scales, as_bf16(found.scales))
    assert int(found.integers.min()) >= grid.low
    assert int(found.integers.max()) <= grid.high


def test_inputs_that_never_come_and_weights_that_are_zero() -> None:
    w, x = drawn(16, 256, 3), inputs(256, 4)
    x[:, 5] = 0.0
    found, _ = gptq(w, x.T @ x / len(x), Grid(4, 128))
    assert found.values().isfinite().all()
    assert torch.equal(found.values()[0], torch.zeros(256))
    nothing, error = gptq(w, torch.zeros(256, 256), Grid(4, 128))
    assert error == 0.0
    assert torch.equal(nothing.values(), round_on(w, Grid(4, 128), extreme_scales(w, Grid(4, 128))).values())
