"""What native programs do row by row, one operation at a time, beside float64: norms, rope, products and embeddings.

A residual stream is read through a norm whose eps is all that it divides by: it rounds to bf16 and does no more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.native_attention import SIZE, blocks_of, paired

from penstock.nn.kernels.native import FORMATS, load_native, usable_kernels
from penstock.nn.kernels.native_recording import BF16, F32, KV_FORMATS, floats, interleaved, words
from penstock.nn.layers.rotary import Rotary
from penstock.nn.quant.rounding import Grid, round_to_nearest

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]
ROUNDING = 1.01 * 2**-8  # half a step of bf16, relative, and what sums in float32 lose besides
GRIDS = {"int8": Grid(8, None), "w8a8": Grid(8, None), "int4": Grid(4, 128), "w4a8": Grid(4, 128)}
SEEDS = st.integers(0, 1 << 20)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def near(found: torch.Tensor, exact: torch.Tensor, room: torch.Tensor | float = 0.0) -> bool:
    """Every element is the nearest bf16, but for `room`."""
    off = (found.double() - exact).abs()
    return bool((off <= ROUNDING * exact.abs() + room).all())


class Rows:
    """A program over the rows of a bf16 table [N, K], which begins with `x`, the stream of what was looked up."""

    def __init__(self, table: torch.Tensor, kernels: str, num_threads: int = 1, most: int = 64) -> None:
        self.native, self.kept = load_native(), [table]
        self.team = self.native.Team(num_threads, [])
        self.program = self.native.Program(kernels, self.team, most)
        self.x = self.program.buffer(F32, table.shape[1])
        self.widths = {self.x: table.shape[1]}
        self.program.embed_bf16(words(table), self.x)

    def buffer(self, width: int) -> int:
        number: int = self.program.buffer(BF16, width)
        self.widths[number] = width
        return number

    def copy(self, x: int) -> int:
        """x as bf16. Numbers from 2^-66 to 2^40."""
        to = self.buffer(self.widths[x])
        self.program.rms_norm(x, np.full(self.widths[x], 2.0**60, np.float32), 2.0**120, to)
        return to

    def packed(self, weight_format: str, w: torch.Tensor, bias: torch.Tensor | None) -> Any:
        weight = self.native.PackedWeight(FORMATS[weight_format], *w.shape)
        weight.fill(self.team, 0, words(w))
        if bias is not None:
            weight.set_bias(floats(bias))
        return weight

    def run(self, ids: np.ndarray, to: int) -> torch.Tensor:
        """What the rows of these ids, each one a request, leave in the buffer `to`."""
        num = len(ids)
        self.program.run(ids, np.zeros(num, np.int64), np.arange(num + 1), np.zeros(num, np.int64), [])
        return self.read(num, to)

    def read(self, num: int, to: int) -> torch.Tensor:
        found = torch.full((num, self.widths[to]), torch.nan, dtype=torch.bfloat16)
        self.program.read(to, words(found))
        return found


def check_company(rows: Rows, ids: np.ndarray, to: int) -> torch.Tensor:
    """What all rows become together; some alone and in another order become the same bits."""
    found = rows.run(ids, to)
    assert torch.equal(rows.run(ids[::-1].copy(), to), found.flip(0))
    for at in {0, len(ids) // 2, len(ids) - 1}:
        assert torch.equal(rows.run(ids[at : at + 1], to)[0], found[at])
    return found


def ids_of(num: int, table: torch.Tensor, seed: int) -> np.ndarray:
    """In any order, some twice."""
    return np.random.default_rng(seed).integers(0, len(table), num)


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=30, deadline=None)
@given(
    num=st.integers(1, 40),
    width=st.integers(1, 300),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    num_threads=st.sampled_from([1, 2]),
    seed=SEEDS,
)
def test_norms(kernels: str, num: int, width: int, eps: float, num_threads: int, seed: int) -> None:
    """Rows of every size: those whose eps decides, and zeros."""
    table = draw(9, width, seed=seed) * 2.0 ** torch.tensor([0, -12, -10, -8, -5, 3, 9, 30, -40])[:, None]
    table[4] = 0
    weight = draw(width, seed=seed + 1).float()
    rows = Rows(table.bfloat16(), kernels, num_threads)
    to = rows.buffer(width)
    rows.program.rms_norm(rows.x, weight.numpy(), eps, to)
    ids = ids_of(num, table, seed)
    x = table[ids].double()
    exact = x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    assert near(check_company(rows, ids, to), exact)


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.integers(1, 16).map(lambda n: 16 * n),
    kv_format=st.sampled_from(["bfloat16", "int8"]),
    normed=st.tuples(st.booleans(), st.booleans()),
    eps=st.sampled_from([1e-6, 1e-2]),
    num_threads=st.sampled_from([1, 2]),
    seed=SEEDS,
)
def test_heads(
    data: st.DataObject,
    kernels: str,
    heads: int,
    group: int,
    dim: int,
    kv_format: str,
    normed: tuple[bool, bool],
    eps: float,
    num_threads: int,
    seed: int,
) -> None:
    """Queries and keys are normed and turned, values stay; the cache holds the very bits of bf16 keys and values."""
    rotary = data.draw(st.just(dim) | st.integers(1, dim // 2).map(lambda n: 2 * n), label="rotary")
    starts = np.array(data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=3), label="starts"))
    nums = np.array(data.draw(st.lists(st.integers(1, 40), min_size=len(starts), max_size=len(starts)), label="nums"))
    tables = Rotary(rotary, 140, 1e4, None)
    width = (2 + group) * heads * dim
    table = draw(50, width, seed=seed)
    table[::2] *= 2**-8
    table[3] = 0
    rows = Rows(table, kernels, num_threads, most=130)
    qkv = rows.copy(rows.x)
    pool = torch.zeros(
        1 + 3 * 5, 2 * heads * SIZE * (2 * dim if kv_format == "bfloat16" else dim + 2), dtype=torch.uint8
    )
    number = rows.program.pool(pool.numpy(), heads, dim, 0, 0, KV_FORMATS[kv_format])
    norms = [draw(dim, seed=seed + n).float() + 1 if some else None for n, some in enumerate(normed)]
    rows.program.heads(
        qkv, heads * group, number, *(None if norm is None else norm.numpy() for norm in norms), eps,
        tables.cos.numpy(), tables.sin.numpy(),
    )  # fmt: skip
    positions = np.concatenate([np.arange(start, start + num) for start, num in zip(starts, nums, strict=True)])
    ids = ids_of(len(positions), table, seed)
    block_table = np.array([blocks_of(request, 5 * SIZE) for request in range(len(starts))], np.int32)
    rows.program.run(ids, positions, np.cumsum([0, *nums]), starts, [block_table])
    found = rows.read(len(ids), qkv)
    parts = table[ids].double().view(len(ids), -1, dim).split((heads * group, heads, heads), 1)
    of_parts = found.view(len(ids), -1, dim).split((heads * group, heads, heads), 1)
    turn = torch.complex(tables.cos[positions].double(), tables.sin[positions].double())[:, None]
    for x, norm, ours in zip(parts[:2], norms, of_parts[:2], strict=True):
        exact = x.clone()
        if norm is not None:
            exact = x / (x.square().mean(2, keepdim=True) + eps).sqrt() * norm.double()
        pairs = torch.complex(*exact[..., :rotary].chunk(2, 2)) * turn
        exact[..., :rotary] = torch.cat((pairs.real, pairs.imag), 2)
        room = torch.zeros_like(exact)
        room[..., :rotary] = 4e-7 * torch.cat((pairs.abs(), pairs.abs()), 2)
        assert near(ours, exact, room)
    assert torch.equal(of_parts[2].double(), parts[2])
    if kv_format == "int8":
        return  # what is stored of it, test_int8_kv.py looks at
    blocks = pool.view(torch.bfloat16).view(len(pool), 2, heads, -1)
    for request, (first, start, num) in enumerate(zip(np.cumsum(nums) - nums, starts, nums, strict=True)):
        for part, x in enumerate(of_parts[1:]):
            padded = torch.zeros(5 * SIZE, heads, dim, dtype=torch.bfloat16)
            padded[start : start + num] = x[first : first + num]
            for block, of_block in zip(block_table[request], padded.split(SIZE), strict=True):
                expected = torch.stack([paired(of_block[:, head], "kv"[part]) for head in range(heads)])
                assert torch.equal(blocks[block, part], expected)


def rounded(x: torch.Tensor, weight_format: str) -> torch.Tensor:
    """Rows as products with weights of that format read them, float64."""
    if weight_format not in ("w8a8", "w4a8"):
        return x.double()
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (x.float() * (1 / scale)).round().double() * scale.double()


def values_of(weight: Any) -> torch.Tensor:
    values = torch.empty(weight.n, weight.k)
    weight.unpack(values.numpy())
    return values.double()


PRODUCTS = {
    "num": st.integers(1, 60),
    "k": st.integers(1, 260),
    "weight_format": st.sampled_from(sorted(FORMATS)),
    "biased": st.booleans(),
    "num_threads": st.sampled_from([1, 2]),
    "seed": SEEDS,
}


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 150), times=st.integers(1, 6), **PRODUCTS)
def test_products_into_a_buffer_and_onto_the_stream(
    kernels: str, n: int, times: int, num: int, k: int, weight_format: str, biased: bool, num_threads: int, seed: int
) -> None:
    """`linear` rounds once; `linear_add` adds to float32, where small terms add up that bf16 would lose."""
    table, w, square = draw(20, k, seed=seed), draw(n, k, seed=seed + 1), draw(k, k, seed=seed + 2) * 2.0**-9
    bias, few = (draw(size, seed=seed + 3).float() if biased else None for size in (n, k))
    rows = Rows(table, kernels, num_threads)
    a, to = rows.copy(rows.x), rows.buffer(n)
    down, up = rows.packed(weight_format, w, bias), rows.packed(weight_format, square, few)
    rows.program.linear(down, a, to)
    for _ in range(times):
        rows.program.linear_add(up, a, rows.x)
    end = rows.copy(rows.x)
    ids = ids_of(num, table, seed)
    x = rounded(table[ids], weight_format)
    for found, weight, more, start, count in (
        (check_company(rows, ids, to), down, bias, 0.0, 1),
        (check_company(rows, ids, end), up, few, table[ids].double(), times),
    ):
        values = values_of(weight)
        exact = start + count * (x @ values.T + (0.0 if more is None else more.double()))
        assert near(found, exact, 1e-6 * count * (x.abs() @ values.abs().T + 2 + exact.abs()))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=40, deadline=None)
@given(blocks=st.integers(1, 6), **PRODUCTS)
def test_gated_products(
    kernels: str, blocks: int, num: int, k: int, weight_format: str, biased: bool, num_threads: int, seed: int
) -> None:
    table, w = draw(20, k, seed=seed), draw(32 * blocks, k, seed=seed + 1)
    bias = draw(32 * blocks, seed=seed + 3).float() if biased else None
    rows = Rows(table, kernels, num_threads)
    a, to = rows.copy(rows.x), rows.buffer(16 * blocks)
    weight = rows.packed(weight_format, interleaved(w), None if bias is None else interleaved(bias))
    rows.program.linear_silu_mul(weight, a, to)
    ids = ids_of(num, table, seed)
    x, values = rounded(table[ids], weight_format), values_of(weight)
    plain = values.view(-1, 2, 16, k).transpose(0, 1).reshape(values.shape)  # gate, then up
    gate, up = (x @ plain.T + (0.0 if bias is None else bias.double())).chunk(2, 1)
    off = 1e-6 * (x.abs() @ plain.abs().T + 2).amax(1, keepdim=True)
    assert near(check_company(rows, ids, to), silu(gate) * up, off * (1 + gate.abs() + up.abs()))


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=25, deadline=None)
@given(num=st.integers(1, 40), blocks=st.integers(1, 5), seed=SEEDS)
def test_silu_times_up(kernels: str, num: int, blocks: int, seed: int) -> None:
    """Of numbers that weights like an identity hand on: also where e to their power is no number any more."""
    width = 16 * blocks
    gate, up = draw(12, width, seed=seed), draw(12, width, seed=seed + 1)
    gate *= 2.0 ** torch.tensor([-20, -8, -1, 0, 1, 2, 3, 4, 5, 6, 9, 36])[:, None]
    gate[:, 0], up[0, :3] = torch.tensor([-88.5, 88.5] * 6), 2.0**36
    table = torch.cat((gate, up), 1).bfloat16()
    rows = Rows(table, kernels)
    a, to = rows.copy(rows.x), rows.buffer(width)
    rows.program.linear_silu_mul(rows.packed("bf16", interleaved(torch.eye(2 * width).bfloat16()), None), a, to)
    ids = ids_of(num, table, seed)
    gates, ups = table[ids].double().chunk(2, 1)
    assert near(check_company(rows, ids, to), silu(gates) * ups, 1e-25 * ups.abs())


@pytest.mark.parametrize("weight_format", FORMATS)
@settings(max_examples=12, deadline=None)
@given(
    kernels=st.sampled_from(KERNELS or ("none",)),
    num=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    num_threads=st.sampled_from([1, 2]),
    seed=SEEDS,
)
def test_embeddings_are_rows_of_the_table_or_what_it_was_rounded_to(
    weight_format: str, kernels: str, num: int, n: int, k: int, num_threads: int, seed: int
) -> None:
    table = draw(n, k, seed=seed)
    rows = Rows(table, kernels, num_threads)
    plain = rows.copy(rows.x)
    weight = rows.packed(weight_format, table, None)
    rows.program.embed_packed(weight, rows.x)
    unpacked = rows.copy(rows.x)
    ids = ids_of(num, table, seed)
    grid = GRIDS.get(weight_format)
    values = table.float() if grid is None else round_to_nearest(table.float(), grid).values()
    assert torch.equal(check_company(rows, ids, plain), table[ids])
    assert torch.equal(check_company(rows, ids, unpacked), values[ids].bfloat16())
