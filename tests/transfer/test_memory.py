"""Scatter lists, the step counter, and what the checksum notices."""

from __future__ import annotations

import ctypes
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.transfer.rig import LAYOUTS, random_memory

from penstock.config.model import KVGroup, KVLayout
from penstock.transfer.counter import LAYERS_PER_STEP, StepCounter
from penstock.transfer.memory import MASK, KVMemory, checksum, unit_numbers

ids_lists = st.lists(st.integers(0, 39), max_size=30, unique=True)


@given(ids=ids_lists, layer=st.integers(0, 3))
@settings(deadline=None)
def test_a_scatter_list_has_one_view_per_run(ids: list[int], layer: int) -> None:
    """The views' bytes are the blocks' in order; no two neighbours could be one."""
    memory = random_memory(LAYOUTS["window"], 40, 1)
    views = memory.scatter(layer, ids)
    assert b"".join(bytes(view) for view in views) == memory.pools[layer][np.asarray(ids, int)].tobytes()
    runs = 1 + sum(b != a + 1 for a, b in itertools.pairwise(ids)) if ids else 0
    assert len(views) == runs


def test_blocks_outside_the_pool_and_pools_of_another_layout_are_refused() -> None:
    memory = random_memory(LAYOUTS["full"], 40, 1)
    for ids in ([40], [-1], [38, 39, 40]):
        with pytest.raises(IndexError):
            memory.scatter(0, ids)
    with pytest.raises(ValueError, match="pools"):
        KVMemory(LAYOUTS["window"], memory.pools)
    with pytest.raises(ValueError, match="layer 0"):
        KVMemory(LAYOUTS["int8"], memory.pools[:2])
    frozen = memory.pools[0].copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        KVMemory(LAYOUTS["full"], [frozen, *memory.pools[1:]])


def test_a_unit_is_copied_in() -> None:
    memory = random_memory(LAYOUTS["full"], 4, 1)
    content = np.arange(memory.layer_bytes[1], dtype=np.uint64).astype(np.uint8)
    memory.fill(1, 2, content)
    assert bytes(memory.scatter(1, [2])[0]) == content.tobytes()


@given(ids=ids_lists, seed=st.integers(0, 2**32), at=st.integers(0, 30))
@settings(deadline=None)
def test_sums_add_up_in_any_order(ids: list[int], seed: int, at: int) -> None:
    """Of parts, of permutations, of views and of gathered copies; numbered as the other end numbers them."""
    memory = random_memory(LAYOUTS["full"], 40, 1)
    units = [(block * 7 + 3) % 1000 for block in ids]
    whole = memory.checksum(1, ids, units)
    parts = memory.checksum(1, ids[:at], units[:at]) + memory.checksum(1, ids[at:], units[at:])
    assert parts & MASK == whole
    both = list(zip(ids, units, strict=True))
    random.Random(seed).shuffle(both)
    assert memory.checksum(1, [b for b, _ in both], [u for _, u in both]) == whole


@pytest.mark.parametrize("num_bytes", [1, 7, 8, 9, 64, 100, 4096])
def test_a_sum_notices(num_bytes: int) -> None:
    """Every single changed bit; units lost, doubled, swapped or in another's place, even if all zero; swapped words."""
    rng = np.random.default_rng(num_bytes)
    content = rng.integers(0, 256, (6, num_bytes), np.uint8)
    content[4:] = 0
    numbers = unit_numbers(3, np.asarray([5, 6, 9, 11, 12, 2]))
    true = checksum(content, numbers)
    seen = {true}

    def differs(changed: np.ndarray, their_numbers: np.ndarray) -> None:
        found = checksum(changed, their_numbers)
        assert found != true
        seen.add(found)

    for place in range(0, 8 * num_bytes, max(1, num_bytes // 40)):
        changed = content.copy()
        changed[2, place // 8] ^= 1 << place % 8
        differs(changed, numbers)
    for lost in range(6):
        keep = np.arange(6) != lost
        differs(content[keep], numbers[keep])
        again = np.append(np.arange(6), lost)
        differs(content[again], numbers[again])
    differs(content[[1, 0, 2, 3, 4, 5]], numbers)
    other = numbers.copy()
    other[4] = unit_numbers(3, np.asarray([13]))[0]  # zeros said to be in another place
    differs(content, other)
    differs(content, numbers | np.uint64(1 << 43))  # another layer
    if num_bytes >= 16:
        words = content.copy()
        words[0, :8], words[0, 8:16] = content[0, 8:16], content[0, :8].copy()
        differs(words, numbers)
    assert len(seen) > 10


def test_the_counter_counts() -> None:
    """value = step * 4096 + layers done, in native memory, never falling."""
    counter = StepCounter()
    native = ctypes.c_int64.from_address(counter.address)
    counter.begin(3)
    assert native.value == 3 * LAYERS_PER_STEP
    assert counter.is_done(2, 4000)
    assert not counter.is_done(3, 0)
    counter.layer_done()
    native.value += 1  # as native code does
    assert counter.layers_done(3) == 2
    assert counter.is_done(3, 1)
    assert not counter.is_done(3, 2)
    counter.end()
    assert counter.is_done(3, 4094)
    assert not counter.is_done(4, 0)
    assert counter.layers_done(4) == 0
    counter.begin(4)
    assert counter.layers_done(3) == LAYERS_PER_STEP - 1
    with pytest.raises(AssertionError):
        counter.begin(2)


def test_latent_blocks_have_one_part() -> None:
    """Latent attention keeps one head and no values; the format says so, and that of keys and values is as it was."""
    plain = KVGroup(0, "full", (0, 1), None, 64, 1, 576, "bfloat16")
    latent = KVGroup(0, "full", (0, 1), None, 64, 1, 576, "bfloat16", parts=("k",))
    assert latent.layer_bytes * 2 == plain.layer_bytes
    assert latent.extent(1, "k", 0, 1) == (latent.layer_bytes, 64 * 576 * 2)
    with pytest.raises(ValueError):
        latent.extent(0, "v", 0, 1)
    assert KVLayout((plain,)).format == "full:2x1x64x576:bfloat16:hm:plain"
    assert KVLayout((latent,)).format == "full:2x1x64x576:bfloat16:hm:plain:k"
