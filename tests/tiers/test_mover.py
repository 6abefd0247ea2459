"""Copies between device memory and arena slots: the right bytes, or an error."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiers.tier_blocks import ONE, TWO, key, layout_of

from penstock.core.moves import DEVICE, KVMove, Place
from penstock.core.tiering import BAD_BLOCK, HOST
from penstock.tiers.arena import Arena
from penstock.tiers.mover import CANCELLED, FAILED, TierMover

NUM_BLOCKS = 8


class Rank:
    """Device memory of one engine, full of noise, and its mover."""

    def __init__(self, layout, arena, seed=0) -> None:
        dice = np.random.default_rng(seed)
        by_layer = {layer: group for group in layout.groups for layer in group.layers}
        self.pools = [
            dice.integers(0, 256, (NUM_BLOCKS, by_layer[n].layer_bytes), dtype=np.uint8) for n in range(len(by_layer))
        ]
        self.mover = TierMover(layout, self.pools, arena)
        self.next_id = 0
        self.results: list = []

    def move(self, src, dst, **more):
        self.next_id += 1
        self.mover.start(KVMove(self.next_id, f"t{self.next_id}", "r", src, dst, **more))
        return self.result()

    def result(self):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            self.results += self.mover.poll()
            if self.results:
                return self.results.pop(0)
            time.sleep(0.001)
        raise TimeoutError("the mover gave no result")

    def save(self, ids, slots, keys):
        return self.move(Place(DEVICE, ids), Place(HOST, slots, keys))

    def load(self, ids, slots, keys):
        return self.move(Place(HOST, slots, keys), Place(DEVICE, ids))


@pytest.fixture
def two():
    """Two ranks over one arena of a layout with two KV groups."""
    arena = Arena.private(TWO, (6, 6))
    ranks = Rank(TWO, arena, 1), Rank(TWO, arena, 2)
    yield (*ranks, arena)
    for rank in ranks:
        rank.mover.close()


KEYS = (key(1, 0), key(2, 0), key(3, 0), key(1, 1), key(2, 1), key(3, 1))


def test_what_one_engine_saved_another_loads(two):
    """Every layer of every wanted block, and nothing else; entries of 0 are skipped but keep their keys' places."""
    first, second, _ = two
    before = [pool.copy() for pool in second.pools]
    saved = first.save(((3, 5, 1), (0, 2, 7)), ((1, 2, 3), (0, 4, 5)), KEYS)
    assert saved.error is None and saved.num_units == 3 * 2 + 2 * 2
    assert saved.num_bytes == 3 * TWO.groups[0].block_bytes + 2 * TWO.groups[1].block_bytes
    loaded = second.load(((4, 6, 2), (0, 1, 3)), ((1, 2, 3), (0, 4, 5)), KEYS)
    assert loaded.error is None and loaded.num_units == saved.num_units and loaded.seconds > 0
    for group, pairs in ((0, [(3, 4), (5, 6), (1, 2)]), (1, [(2, 1), (7, 3)])):
        for layer in TWO.groups[group].layers:
            for theirs, mine in pairs:
                assert np.array_equal(second.pools[layer][mine], first.pools[layer][theirs])
            others = [n for n in range(NUM_BLOCKS) if n not in {mine for _, mine in pairs}]
            assert np.array_equal(second.pools[layer][others], before[layer][others])


@settings(deadline=None, max_examples=30)
@given(offset=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error(offset, bit):
    """In the key, a checksum, or a layer: the load says so, and layers before the damage were right."""
    arena = Arena.private(ONE, (2,))
    rank = Rank(ONE, arena)
    try:
        rank.save(((1,),), ((1,),), (key(1),))
        format_ = arena.formats[0]
        end = format_.page_start + format_.num_layers * format_.layer_bytes
        arena.record(0, 1)[int(offset * end)] ^= 1 << bit
        matters = not format_._tail_start <= int(offset * end) < format_.page_start
        result = rank.load(((2,),), ((1,),), (key(1),))
        assert (result.error or "").startswith(BAD_BLOCK) == matters
        if not matters:
            assert all(np.array_equal(pool[1], pool[2]) for pool in rank.pools)
    finally:
        rank.mover.close()


def test_a_slot_that_holds_another_block_is_an_error(two):
    first, second, arena = two
    first.save(((3,), ()), ((1,), ()), (key(1),))
    assert second.load(((4,), ()), ((1,), ()), (key(2),)).error == BAD_BLOCK
    assert second.load(((4,), ()), ((2,), ()), (key(2),)).error == BAD_BLOCK, "never written"
    arena.formats[0].clear(arena.record(0, 1))
    assert second.load(((4,), ()), ((1,), ()), (key(1),)).error == BAD_BLOCK


def test_layers_come_one_by_one():
    """The word says how many are in place and checked: each already when the next is not."""
    layout = layout_of(None, num_layers=6, head_dim=256)
    arena = Arena.private(layout, (200,))
    rank = Rank(layout, arena)
    ids, slots = ((1,) * 200,), (tuple(range(1, 201)),)
    keys = tuple(key(n) for n in range(200))
    assert rank.save(ids, slots, keys).error is None
    rank.next_id += 1
    seen: set[int] = set()
    rank.mover.start(KVMove(rank.next_id, "t", "r", Place(HOST, slots, keys), Place(DEVICE, ((2,) * 200,))))
    word = rank.mover.progress(rank.next_id)
    while word[0] < 6:
        ready = int(word[0])
        seen.add(ready)
        for pool in rank.pools[:ready]:
            assert np.array_equal(pool[1], pool[2])
    assert rank.result().error is None
    assert word[0] == 6
    rank.mover.close()


def test_a_failed_load_says_so_in_its_word(two):
    _, second, _ = two
    second.next_id = 1
    second.mover.start(KVMove(1, "t", "r", Place(HOST, ((1,), ()), (key(1),)), Place(DEVICE, ((1,), ()))))
    word = second.mover.progress(1)
    assert second.result().error == BAD_BLOCK
    assert word[0] == FAILED


def test_a_cancelled_move_ends_once(two):
    first, _, _ = two
    blocked = threading.Event()
    original = first.mover._save

    def slow(*args):
        blocked.wait(30)
        return original(*args)

    first.mover._save = slow
    for n in (1, 2):
        first.mover.start(KVMove(n, "t", "r", Place(DEVICE, ((1,), ())), Place(HOST, ((n,), ()), (key(n),))))
    first.mover.cancel(2)
    blocked.set()
    assert first.result().error is None
    result = first.result()
    assert (result.id, result.error) == (2, CANCELLED)
    assert not first.results and not first.mover.poll()


def test_loads_overtake_saves(two):
    first, _, _ = two
    blocked = threading.Event()
    original = first.mover._save

    def slow(move):
        blocked.wait(30)
        return original(move)

    first.mover._save = slow
    for n in (1, 2, 3):
        first.mover.start(KVMove(n, "t", "r", Place(DEVICE, ((1,), ())), Place(HOST, ((n,), ()), (key(n),))))
    first.mover.start(KVMove(4, "t", "r", Place(HOST, ((1,), ()), (key(1),)), Place(DEVICE, ((2,), ()))))
    blocked.set()
    order = [first.result().id for _ in range(4)]
    assert order.index(4) <= 1


def test_a_move_that_has_started_stays_with_its_pools_memory():
    """The pool dies and another takes its place: a save that waited must not write into what is now somebody's slot."""
    old, new = Arena.private(ONE, (2,)), Arena.private(ONE, (2,))
    rank = Rank(ONE, old)
    blocked, original = threading.Event(), rank.mover._save

    def slow(*args):
        blocked.wait(30)
        return original(*args)

    rank.mover._save = slow
    for n in (1, 2):
        rank.mover.start(KVMove(n, "t", "r", Place(DEVICE, ((n,),)), Place(HOST, ((n,),), (key(n),))))
    rank.mover.use(None)
    rank.mover.start(KVMove(3, "t", "r", Place(HOST, ((1,),), (key(1),)), Place(DEVICE, ((3,),))))
    rank.mover.use(new)
    rank.mover.start(KVMove(4, "t", "r", Place(HOST, ((1,),), (key(1),)), Place(DEVICE, ((3,),))))
    blocked.set()
    results = {result.id: result.error for result in (rank.result() for _ in range(4))}
    assert results == {1: None, 2: None, 3: "the pool is gone", 4: BAD_BLOCK}
    assert all(old.formats[0].header(old.record(0, n)).key == key(n) for n in (1, 2))
    assert not new.record(0, 1).any() and not new.record(0, 2).any()
    memory = weakref.ref(old._memory)
    del old
    gc.collect()
    assert memory() is None, "memory of a pool that is gone is given back"
    rank.mover.close()


def test_a_slot_that_changes_during_a_load_is_never_taken_for_the_block():
    """Another block moves in while it is being copied: all of the old one, or an error."""
    layout = layout_of(None, num_layers=8, head_dim=512)
    arena = Arena.private(layout, (2,))
    rank = Rank(layout, arena)
    assert rank.save(((1,),), ((1,),), (key(1),)).error is None
    assert rank.save(((2,),), ((2,),), (key(2),)).error is None
    old, new = arena.record(0, 1).copy(), arena.record(0, 2).copy()
    for _ in range(30):
        rank.next_id += 1
        rank.mover.start(
            KVMove(rank.next_id, "t", "r", Place(HOST, ((1,),), (key(1),)), Place(DEVICE, ((3,),)))
        )  # fmt: skip
        arena.record(0, 1)[:] = new
        result = rank.result()
        if result.error is None:
            assert all(np.array_equal(pool[3], pool[1]) for pool in rank.pools)
        else:
            assert result.error.startswith(BAD_BLOCK)
        arena.record(0, 1)[:] = old
    rank.mover.close()


def test_moves_that_make_no_sense_fail_alone(two):
    """A slot or block out of range, a step to wait for, a peer: each gets its error, and the thread lives on."""
    first, _, _ = two
    assert first.save(((99,), ()), ((1,), ()), (key(1),)).error
    assert first.load(((1,), ()), ((99,), ()), (key(1),)).error
    assert "disk" in first.move(Place(DEVICE, ((1,), ())), Place("disk", ((1,), ()), (key(1),))).error
    assert "step" in first.move(Place(DEVICE, ((1,), ())), Place(HOST, ((1,), ()), (key(1),)), after_step=3).error
    assert first.save(((1,), ()), ((1,), ()), (key(1),)).error is None
