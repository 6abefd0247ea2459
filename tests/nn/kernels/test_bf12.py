"""bf16 weights in 12 bits: every number comes back, and products are those of the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.nn.native_model import QWEN3, native, prompts

from penstock.nn.kernels.native import FORMATS, load_native, usable_kernels

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]


def packed(bits: np.ndarray) -> Any:
    weight = load_native().PackedWeight(FORMATS["bf12"], *bits.shape)
    weight.fill(load_native().Team(2, []), 0, bits)
    return weight


def scattered(n: int, k: int, seed: int) -> torch.Tensor:
    """Of every size, so that many have an exponent that their block's table lacks."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(-24, 8, (n, k), generator=draw)
    return (torch.randn(n, k, generator=draw) * 2.0**size).bfloat16()


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 50), k=st.integers(1, 200), seed=st.integers(0, 1 << 20), kind=st.sampled_from("abc"))
@example(n=17, k=65, seed=0, kind="a")
def test_every_number_comes_back(n: int, k: int, seed: int, kind: str) -> None:
    """Any bits: subnormal numbers, both zeros, infinities and NaN with their payloads among them."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 16, (n, k)).astype(np.uint16)
    if kind == "b":
        bits = bits & 0x807F | random.choice([0, 1, 14, 15, 16, 254], (n, k)).astype(np.uint16) << 7
    elif kind == "c":
        bits = scattered(n, k, seed).view(torch.uint16).numpy()
    out = np.full((n, k), 7.0, np.float32)
    packed(bits).unpack(out)
    assert (out.view(np.uint32) == bits.astype(np.uint32) << 16).all()


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 150), k=st.integers(1, 400), seed=st.integers(0, 1 << 20))
def test_products_with_weights_of_every_size(kernels: str, m: int, n: int, k: int, seed: int) -> None:
    """Beside float64, and a row alone as among others, bit for bit."""
    program = load_native().Program(kernels, load_native().Team(2, []), 70)
    weights = scattered(n, k, seed)
    rows = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    weight = packed(weights.view(torch.uint16).numpy())
    out, alone = torch.full((m, n), torch.nan), torch.empty(1, n)
    program.head(weight, rows.view(torch.uint16).numpy(), out.numpy())
    exact = rows.double() @ weights.double().T
    room = rows.double().abs() @ weights.double().abs().T
    assert bool(((out - exact).abs() <= 2e-6 * k**0.5 * room).all())
    row = m // 2
    program.head(weight, rows[row : row + 1].contiguous().view(torch.uint16).numpy(), alone.numpy())
    assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_model_gives_the_logits_of_bf16(kernels: str) -> None:
    """But for rounding: the few rare weights are added last."""
    both = []
    for weight_format in ("bf16", "bf12"):
        ours = native(QWEN3, kernels, formats=(weight_format, weight_format))
        (prompt,) = prompts(ours.config, 40)
        hidden = ours.step([(0, 0, prompt)])
        both.append(ours.model.logits(hidden).float())
    assert float((both[0] - both[1]).norm() / both[0].norm()) < 1e-2


def test_it_takes_three_quarters_of_the_memory() -> None:
    weights = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = packed(weights.view(torch.uint16).numpy())
    assert weight.num_bytes / (2 * weights.numel()) == pytest.approx(0.75, abs=0.01)
