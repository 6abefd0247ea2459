"""One block pool: states, limbo, eviction order. The schedule tests drive it as a whole; these pin its rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.checks import check_pool

from penstock.core.blocks import BlockPool


def filled(num: int, leaf_first: bool = True) -> tuple[BlockPool, list[int], list[bytes]]:
    """A pool of `num` usable blocks, all held and published as one chain."""
    pool = BlockPool(num + 1, leaf_first)
    ids = [pool.allocate(0.0) for _ in range(num)]
    hashes = [bytes([n]) * 16 for n in range(num)]
    for n in range(num):
        pool.publish(ids[n], hashes[n], hashes[n - 1] if n else None)
    return pool, ids, hashes


def test_the_null_block_is_never_given_out() -> None:
    pool = BlockPool(4)
    assert {pool.allocate(0.0) for _ in range(3)} == {1, 2, 3}
    assert pool.num_available == 0
    with pytest.raises(ValueError, match="at least 2"):
        BlockPool(1)


def test_leaves_go_before_their_parents_whatever_the_order_of_release() -> None:
    """Released root first, the oldest by use is the root; still the deepest block is evicted first."""
    pool, ids, hashes = filled(3)
    for block_id in ids:
        pool.release(block_id, -1)
    for deepest in (2, 1, 0):
        pool.allocate(1.0)
        assert hashes[deepest] not in pool.index
        assert all(h in pool.index for h in hashes[:deepest])
    assert list(pool.ghosts) == hashes[::-1]


def test_a_cached_parent_of_a_held_child_is_the_last_resort() -> None:
    pool, ids, hashes = filled(2)
    pool.release(ids[0], -1)
    assert pool.num_available == 1
    assert pool.allocate(1.0) == ids[0]
    assert hashes[0] not in pool.index
    assert hashes[1] in pool.index


def test_window_groups_give_the_oldest_block() -> None:
    pool, ids, hashes = filled(3, leaf_first=False)
    for block_id in ids:
        pool.release(block_id, -1)
    pool.allocate(1.0)
    assert hashes[0] not in pool.index


def test_a_released_block_waits_for_the_steps_in_flight() -> None:
    """In limbo it is not given away, but can be hit; a hit takes it out, and a later release starts a new wait."""
    pool, ids, hashes = filled(2)
    for block_id in reversed(ids):
        pool.release(block_id, 5)
    assert (pool.num_available, pool.num_limbo, pool.num_held) == (0, 2, 0)
    block = pool.hit(hashes[0])
    assert block is not None
    pool.hold(block)
    assert (pool.num_limbo, pool.num_held) == (1, 1)
    pool.settle(4)
    assert pool.num_available == 0
    pool.settle(5)
    assert (pool.num_available, pool.num_cached, pool.num_limbo) == (1, 1, 0)
    pool.release(ids[0], 7)
    pool.settle(6)
    assert pool.num_limbo == 1
    pool.settle(7)
    assert (pool.num_cached, pool.num_limbo) == (2, 0)


def test_equal_content_is_published_once() -> None:
    pool = BlockPool(4)
    one, two = pool.allocate(0.0), pool.allocate(0.0)
    pool.publish(one, b"h", None)
    pool.publish(two, b"h", None)
    pool.release(two, -1)
    assert pool.num_free == 2
    hit = pool.hit(b"h")
    assert hit is not None
    assert hit.id == one


def test_forgetting_frees_what_nobody_holds() -> None:
    pool, ids, _ = filled(3)
    pool.release(ids[2], -1)
    pool.release(ids[1], 9)
    pool.forget()
    assert not pool.index
    assert (pool.num_free, pool.num_cached, pool.num_limbo, pool.num_held) == (1, 0, 1, 1)
    pool.settle(9)
    assert pool.num_free == 2


class Chains:
    """Holders of chains of blocks in one pool, as requests are, with what an eviction must take written down."""

    def __init__(self, usable: int, leaf_first: bool) -> None:
        self.pool = BlockPool(usable + 1, leaf_first)
        self.holders: list[list[int]] = []
        self.step = 0  # newest step in flight is `step`; all before `ended` have been settled
        self.ended = 0

    def evictable(self) -> list[int]:
        """Ids that the next eviction may take, the first choice first."""
        pool = self.pool
        cached = [b for b in pool.blocks[1:] if b.hash is not None and b.num_refs == 0 and b.fence < 0]
        if pool.leaf_first:
            parents = {b.parent_hash for b in pool.blocks[1:] if b.hash is not None}
            cached = [b for b in cached if b.hash not in parents] or cached
        return [b.id for b in sorted(cached, key=lambda b: b.last_use)]

    def allocate(self) -> int | None:
        """A block, from the free ones or the one that must go."""
        if not self.pool.num_available:
            return None
        expected = None if self.pool.num_free else self.evictable()[0]
        block_id = self.pool.allocate(float(self.step))
        assert expected in (None, block_id), "another block should have been evicted"
        return block_id

    def start(self, prefix: int, length: int) -> None:
        """Hold what is cached of a chain, then compute and publish the rest as far as blocks go."""
        hashes = [bytes([prefix, n]) for n in range(length)]
        held: list[int] = []
        for hash_ in hashes:
            block = self.pool.hit(hash_)
            if block is None:
                break
            self.pool.hold(block)
            held.append(block.id)
        for n in range(len(held), length):
            block_id = self.allocate()
            if block_id is None:
                break
            held.append(block_id)
            self.pool.publish(block_id, hashes[n], hashes[n - 1] if n else None)
        self.holders.append(held)

    def end(self, number: int, fenced: bool) -> None:
        """A holder gives everything back, deepest first."""
        if self.holders:
            for block_id in reversed(self.holders.pop(number % len(self.holders))):
                self.pool.release(block_id, self.step if fenced else -1)

    def check(self) -> None:
        refs: dict[int, int] = {}
        for held in self.holders:
            for block_id in held:
                refs[block_id] = refs.get(block_id, 0) + 1
        check_pool(self.pool, refs, self.step)


@settings(deadline=None, max_examples=400)
@given(st.booleans(), st.integers(2, 12), st.lists(st.integers(0, 8 * 64 - 1), min_size=10, max_size=60))
def test_any_use_keeps_the_books_and_evicts_the_oldest_leaf(leaf_first: bool, usable: int, tape: list[int]) -> None:
    """Chains that start, share, end behind steps or not; each eviction takes the least recently used leaf."""
    chains = Chains(usable, leaf_first)
    for number in tape:
        kind, arg = number % 8, number // 8
        if kind < 3:
            chains.start(arg % 3, 1 + arg // 3 % 6)
        elif kind < 6:
            in_flight = chains.ended < chains.step
            chains.end(arg, fenced=in_flight)
        elif kind == 6:
            chains.step += 1
        elif arg % 8 == 0:
            chains.pool.forget()
        else:
            chains.pool.settle(chains.step)
            chains.ended = chains.step
        chains.check()
    chains.pool.settle(chains.step)
    while chains.holders:
        chains.end(0, fenced=False)
    chains.check()
    assert chains.pool.num_available == usable


@pytest.mark.parametrize("leaf_first", [True, False])
def test_a_prefix_that_is_hit_for_ever_leaves_no_trail(leaf_first: bool) -> None:
    """What the pool keeps per release is bounded, also when nothing ever needs to be evicted."""
    pool, ids, hashes = filled(3, leaf_first)
    for block_id in reversed(ids):
        pool.release(block_id, -1)
    for _ in range(500):
        blocks = [pool.hit(h) for h in hashes]
        for block in blocks:
            assert block is not None
            pool.hold(block)
        for block_id in reversed(ids):
            pool.release(block_id, -1)
    check_pool(pool, {})
    assert len(pool._heap) <= 4 * pool.num_blocks + 1
    first = ids[-1]
    assert pool.allocate(0.0) == first, "the oldest use goes first"
