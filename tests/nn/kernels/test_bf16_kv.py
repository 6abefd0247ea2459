"""Native bf16 keys and values: what is stored, attention over it beside float32, and the same bits in any company."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.native_attention import REQUESTS, SIZE, Native, blocks_of, drawn, error, paired

from penstock.nn.kernels.attention import attention_reference
from penstock.nn.kernels.native import usable_kernels

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]
SHAPES = [  # KV heads, query heads of each, size
    (heads, group, dim)
    for heads, group, dim in itertools.product((1, 2, 3), (1, 2, 3, 4, 6, 7, 8), range(16, 257, 16))
    if heads * (2 + group) * dim <= 2560
]
WINDOWS = st.none() | st.integers(1, 80) | st.sampled_from([511, 512, 513])
CACHED = st.integers(0, 70) | st.sampled_from([0, 31, 32, 33, 490, 511, 512, 540, 1030])
NEW = st.just(1) | st.integers(1, 45)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


def stored(native: Native, request: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a request's blocks hold its keys and values [T, Hkv, D] in their order, then zeros."""
    blocks = native.store.pools[0].flatten(3)[blocks_of(request, len(keys))]
    for part, x in enumerate((keys, values)):
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -len(x) % SIZE))
        for block, rows in zip(blocks, padded.split(SIZE), strict=True):
            expected = torch.stack([paired(rows[:, head], "kv"[part]) for head in range(native.heads)])
            if not torch.equal(bits(block[part]), bits(expected)):
                return False
    return True


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=45, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    rows=st.lists(st.tuples(CACHED, NEW), min_size=1, max_size=REQUESTS),
    order=st.permutations(range(REQUESTS)),
    window=WINDOWS,
    seed=st.integers(0, 1 << 20),
)
def test_attention_agrees_with_float32(
    kernels: str,
    shape: tuple[int, int, int],
    rows: list[tuple[int, int]],
    order: list[int],
    window: int | None,
    seed: int,
) -> None:
    """Chunks of prompts over what is cached and decodes in one batch; of blocks no other byte is touched."""
    heads, group, dim = shape
    most = max(cached + num for cached, num in rows)
    native = Native(drawn(heads, group, dim, seed, most), kernels, heads, group, dim, window, dtype="bfloat16")
    native.store.pools[0].view(torch.uint8).fill_(0xFF)
    taken = [(request, *row) for request, row in zip(order, rows, strict=False)]
    before = [(request, 0, cached) for request, cached, _ in taken if cached]
    prefixes = native.step(before, [])[0].split([cached for *_, cached in before]) if before else ()
    cached_of = {request: qkv for (request, *_), qkv in zip(before, prefixes, strict=True)}
    qkv, out = native.step(taken)
    nums = [num for *_, num in taken]
    used = []
    for (request, cached, num), new, found in zip(taken, qkv.split(nums), out.split(nums), strict=True):
        q, _, _ = native.parts(new)
        _, k, v = native.parts(torch.cat((cached_of.get(request, new[:0]), new)))
        exact, room = (attention_reference(q.float(), k, x, cached, window) for x in (v, v.abs()))
        found = found.view(exact.shape).float()
        assert ((found - exact).abs() <= 1.05 * 2**-8 * (room + exact.abs())).all()  # p and the result in bf16
        assert error(found, exact) <= 1e-2
        assert stored(native, request, k, v)
        used += blocks_of(request, cached + num)
    others = sorted(set(range(len(native.store.pools[0]))) - set(used))
    assert native.store.pools[0].view(torch.uint8)[others].eq(0xFF).all()


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=35, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(1, 1, 16), (1, 7, 48), (2, 3, 64), (1, 2, 112), (2, 1, 128), (1, 1, 256)]),
    window=WINDOWS,
    begin=st.sampled_from([0, 0, 20, 490, 1000]),
    length=st.integers(1, 70),
    num_threads=st.sampled_from([1, 2]),
)
def test_a_row_is_the_same_bit_for_bit_in_any_company(
    data: st.DataObject,
    kernels: str,
    shape: tuple[int, int, int],
    window: int | None,
    begin: int,
    length: int,
    num_threads: int,
) -> None:
    """Alone and whole, or behind `begin` tokens in any chunks among others, on one or two threads."""
    most = begin + length
    settled = (drawn(*shape, 3, max(most, 90)), kernels, *shape, window)
    alone = Native(*settled, dtype="bfloat16")
    mixed = Native(*settled, num_threads, dtype="bfloat16")
    _, expected = alone.step([(0, 0, most)])
    lengths, done, found = (most, 40, 90), [0, 0, 0], []
    if begin:
        found.append(mixed.step([(0, 0, begin)])[1])
        done[0] = begin
    while done[0] < most:
        rows = []
        for request, end in enumerate(lengths):
            left = end - done[request]
            least = min(left, 3) if request == 0 else 0  # an end must come
            num = data.draw(st.integers(least, left) | st.integers(least, min(left, 3)), label=f"tokens of {request}")
            if num:
                rows.append((request, done[request], num))
                done[request] += num
        rows = data.draw(st.permutations(rows))
        results = mixed.step(rows)[1].split([num for *_, num in rows])
        found += [of for (request, *_), of in zip(rows, results, strict=True) if request == 0]
    assert torch.equal(bits(torch.cat(found)), bits(expected))
    theirs, ours = (bits(each.store.pools[0][blocks_of(0, most)]) for each in (alone, mixed))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("kernels", KERNELS)
def test_long_contexts_are_cut_where_they_always_are(kernels: str, window: int | None) -> None:
    """Decodes by one or two threads, alone or among others: spans are tasks of their own, or walked by one of them."""
    shape, length, start = (2, 3, 64), 1130, 1000
    settled = (drawn(*shape, 5, length), kernels, *shape, window)
    whole = Native(*settled, dtype="bfloat16")
    _, expected = whole.step([(0, 0, length)])
    for num_threads, others in itertools.product((1, 2), (0, 40)):
        cut = Native(*settled, num_threads, dtype="bfloat16")
        cut.step([(0, 0, start)], [])
        company = [(1, 0, others)] if others else []
        found = torch.cat([cut.step([*company, (0, n, 1)])[1][-1:] for n in range(start, length)])
        assert torch.equal(bits(found), bits(expected[start:]))


def test_the_instruction_sets_store_the_same_and_agree() -> None:
    made = [Native(drawn(2, 2, 80, 1, 600), kernels, 2, 2, 80, dtype="bfloat16") for kernels in KERNELS]
    found = [each.step([(0, 0, 600), (1, 0, 40)])[1] for each in made]
    for other, out in zip(made[1:], found[1:], strict=True):
        assert torch.equal(bits(other.store.pools[0]), bits(made[0].store.pools[0]))
        assert error(out, found[0]) <= 3e-3
