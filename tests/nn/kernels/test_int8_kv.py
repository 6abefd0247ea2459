"""int8 keys and values: what is stored, attention over it beside float32, and the same bits in any company."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.native_attention import SIZE, Native, blocks_of, drawn, error, paired

from penstock.config.model import KVGroup, KVLayout
from penstock.nn.doors import Spans
from penstock.nn.kernels.attention import PagedAttention, attention_reference, dequantize_heads, quantize_heads
from penstock.nn.kernels.native import usable_kernels
from penstock.runner.kv_store import KVStore

KERNELS = usable_kernels()
pytestmark = pytest.mark.usefixtures("one_thread")
native_only = pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine")


def dequantized(x: torch.Tensor) -> torch.Tensor:
    """float32, through int8."""
    return dequantize_heads(*quantize_heads(x), torch.float32)


@settings(max_examples=100, deadline=None)
@given(
    exponents=st.lists(st.integers(-120, 100), min_size=1, max_size=5),
    dim=st.sampled_from([2, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1 << 20),
)
def test_numbers_are_the_nearest_of_a_scale_that_cuts_nothing_off(
    exponents: list[int], dim: int, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(len(exponents), dim, generator=torch.Generator().manual_seed(seed))
    x = (x * 2.0 ** torch.tensor(exponents)[:, None]).to(dtype)
    x[0, 0] = 0
    numbers, scale = quantize_heads(x)
    exact = x.double().abs().amax(1) / 127
    assert (scale.double() >= exact * (1 - 1e-6)).all()
    assert ((scale.double() <= exact * (1 + 2**-7)) | (exact < 2.0**-99)).all()
    assert ((numbers.double() * scale.double()[:, None] - x).abs() <= 0.5001 * scale.double()[:, None]).all()


def test_heads_that_are_no_numbers_and_heads_of_zeros() -> None:
    x = torch.zeros(4, 16)
    x[1, 3], x[2, 5], x[3, 7] = math.nan, -math.inf, 2.0
    numbers, scale = quantize_heads(x)
    assert scale.isnan().tolist() == [False, True, True, False]
    assert not numbers[:3].any()
    assert dequantize_heads(numbers, scale, torch.float32)[3, 7] == pytest.approx(2.0, rel=1e-2)
    assert not dequantize_heads(numbers, scale, torch.float32)[0].any()


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40) | st.just(1)), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from([8, 20, 32]),
    block_size=st.sampled_from([1, 4, 32]),
    window=st.none() | st.integers(1, 50),
    seed=st.integers(0, 1 << 20),
)
def test_plain_torch_attends_to_what_it_stored(
    rows: list[tuple[int, int]], heads: int, group: int, dim: int, block_size: int, window: int | None, seed: int
) -> None:
    """Tokens of the same step too are read back as int8: a prompt in two steps sees what a whole one sees."""
    layout = KVLayout(
        (KVGroup(0, "full" if window is None else "window", (0,), window, block_size, heads, dim, "int8"),)
    )
    counts = [-(-(start + num) // block_size) for start, num in rows]
    store = KVStore(layout, (1 + sum(counts),), torch.device("cpu"))
    assert store.num_bytes == layout.groups[0].block_bytes * (1 + sum(counts))
    ids = iter(np.random.default_rng(seed).permutation(np.arange(1, 1 + sum(counts))))
    table = np.zeros((len(rows), max(counts)), np.int32)
    for r, count in enumerate(counts):
        table[r, :count] = list(itertools.islice(ids, count))
    draw = torch.Generator().manual_seed(seed)
    sizes = [start + num for start, num in rows]
    q = [torch.randn(size, heads * group, dim, generator=draw) for size in sizes]
    k, v = ([torch.randn(size, heads, dim, generator=draw) for size in sizes] for _ in range(2))
    attention = PagedAttention(layout, store.pools, torch.float32)

    def step(begins: list[int], ends: list[int]) -> list[torch.Tensor]:
        taken = [r for r in range(len(rows)) if ends[r] > begins[r]]
        nums = [ends[r] - begins[r] for r in taken]
        spans = Spans(np.cumsum([0, *nums]), np.array([begins[r] for r in taken]), (table[taken],))
        parts = (torch.cat([of[r][begins[r] : ends[r]] for r in taken]) for of in (q, k, v))
        out = attention.prepare(spans).run(0, *parts)
        return list(out.view(len(out), -1, dim).split(nums))

    starts = [start for start, _ in rows]
    if any(starts):
        step([0] * len(rows), starts)
    for r, out in enumerate(step(starts, sizes)):
        expected = attention_reference(q[r][starts[r] :], dequantized(k[r]), dequantized(v[r]), starts[r], window)
        assert (out - expected).abs().max() <= 4e-6


@native_only
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kernels=st.sampled_from(KERNELS or ("none",)),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    dim=st.sampled_from([16, 64, 80, 96, 128, 192, 256]),
    window=st.none() | st.integers(1, 80),
    seed=st.integers(0, 1 << 20),
)
def test_native_attention_agrees_with_float32_over_what_was_stored(
    data: st.DataObject, kernels: str, heads: int, group: int, dim: int, window: int | None, seed: int
) -> None:
    """A ragged batch after another; what remains between is the rounding of queries, probabilities and results."""
    native = Native(drawn(heads, group, dim, seed, 210), kernels, heads, group, dim, window)
    ends = [0, 0, 0]
    kept: list[list[torch.Tensor]] = [[], [], []]
    for _ in range(3):
        taken = data.draw(
            st.lists(st.tuples(st.integers(0, 2), st.integers(1, 70)), min_size=1, unique_by=lambda r: r[0])
        )
        rows = [(request, ends[request], num) for request, num in taken]
        qkv, out = native.step(rows)
        nums = [num for *_, num in rows]
        for (request, start, num), new, found in zip(rows, qkv.split(nums), out.split(nums), strict=True):
            kept[request].append(new)
            ends[request] += num
            q, k, v = native.parts(torch.cat(kept[request]))
            exact = attention_reference(q[start:].float(), dequantized(k), dequantized(v), start, window)
            assert error(found, exact.flatten(1)) <= 3e-3
    for request, end in enumerate(ends):
        if not end:
            continue
        _, k, v = native.parts(torch.cat(kept[request]))
        for number, (part, x) in itertools.product(range(-(-end // SIZE)), enumerate((k, v))):
            numbers, scale = quantize_heads(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -end % SIZE)))
            block = native.store.pools[0][1 + request + 3 * number, part]
            begin, used = number * SIZE, min(SIZE, end - number * SIZE)
            for head in range(heads):
                expected = paired(numbers[begin : begin + SIZE, head], "kv"[part])
                assert torch.equal(block[head, : SIZE * dim], expected)
                scales = block[head, SIZE * dim :].view(torch.bfloat16)
                assert torch.equal(scales[:used], scale[begin : begin + used, head])


@native_only
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_row_is_the_same_bit_for_bit_however_it_is_cut(kernels: str, window: int | None) -> None:
    """Alone and whole, or by 1, 7 and 16 tokens, among others, on one or two threads; over several spans."""
    heads, group, dim, length = 2, 3, 64, 1210
    table = drawn(heads, group, dim, 5, length + 3)
    whole = Native(table, kernels, heads, group, dim, window)
    _, expected = whole.step([(0, 0, length)])
    for num_threads, chunk in itertools.product((1, 2), (1, 7, 16, length)):
        cut = Native(table, kernels, heads, group, dim, window, num_threads)
        found, start = [], 0
        if chunk < 16:  # the beginning at once: what is cut is what crosses a span
            start = 1100
            found.append(cut.step([(0, 0, start), (1, 0, 33)])[1][:start])
        for begin in range(start, length, chunk):
            num = min(chunk, length - begin)
            rows = [(1, begin, 1), (0, begin, num), (2, begin, 3)]
            found.append(cut.step(rows if begin % 2 else rows[1:2])[1][begin % 2 :][:num])
        assert torch.equal(torch.cat(found), expected)
        blocks = blocks_of(0, length)
        assert torch.equal(cut.store.pools[0][blocks], whole.store.pools[0][blocks])


@native_only
def test_the_instruction_sets_store_the_same_and_agree() -> None:
    """The products are of integers: only the softmax may differ in its last bits."""
    made = [Native(drawn(2, 2, 80, 1, 600), kernels, 2, 2, 80) for kernels in KERNELS]
    found = [each.step([(0, 0, 600), (1, 0, 40)])[1] for each in made]
    for other, out in zip(made[1:], found[1:], strict=True):
        assert torch.equal(other.store.pools[0], made[0].store.pools[0])
        assert error(out, found[0]) <= 1e-3


@native_only
@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_no_number_harms_only_its_own_request(kernels: str) -> None:
    table = drawn(1, 2, 64, 7, 40)
    fresh = Native(table, kernels, 1, 2, 64)
    expected = fresh.step([(0, 0, 40), (1, 0, 40)])[1]
    broken = table.clone()
    broken[5] = math.nan
    harmed = Native(broken, kernels, 1, 2, 64)
    found = harmed.step([(0, 0, 40), (1, 0, 40)])[1]
    assert found[5:40].isnan().all()
    assert torch.equal(found[:5], expected[:5])
    assert torch.equal(found[40:], expected[40:])
    assert torch.equal(harmed.step([(0, 0, 5)])[1], expected[:5])
