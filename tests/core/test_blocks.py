"""One block pool: states, limbo, eviction order. The schedule tests drive it as a whole; these pin its rules."""

from __future__ import annotations

import pytest

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
