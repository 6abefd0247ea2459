"""What a tier keeps and gives up: slots, pins and the tree after any sequence of calls; what each policy values."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.eviction import AUTO, POLICIES, PolicyChoice, TierIndex


def key(*path: int) -> bytes:
    """Of the block at this path of a tree; its parent's is that of path[:-1]."""
    return hashlib.blake2b(repr(path).encode(), digest_size=16).digest() + b"\0" if path else b""


def check_index(index: TierIndex, reserved: set[int]) -> None:
    """Every slot is in one state; children are counted; every leaf without a pin can be found by eviction."""
    resident = [entry.slot for entry in index.entries.values()]
    slots = [*index._free, *reserved, *resident]
    assert sorted(slots) == list(range(1, index.num_slots + 1))
    assert index.num_reserved == len(reserved)
    children: dict[bytes, int] = {}
    for entry in index.entries.values():
        if entry.parent:
            children[entry.parent] = children.get(entry.parent, 0) + 1
    assert index._num_children == children
    in_heap = set(index._heap)
    for entry in index.entries.values():
        if not entry.num_pins and entry.key not in children:
            assert (entry.score, entry.last_use, entry.key) in in_heap


PATHS = (
    [(a,) for a in range(3)]
    + [(a, b) for a in range(3) for b in range(2)]
    + [(a, 0, c) for a in range(3) for c in range(2)]
)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "publish", "give_back", "touch", "pin", "unpin", "remove", "cost", "coldest"]),
        st.integers(0, 200),
        st.floats(0.0, 100.0),
    ),
    max_size=120,
)


@settings(deadline=None, max_examples=200)
@given(policy=st.sampled_from([*POLICIES, AUTO]), num_slots=st.integers(1, 6), operations=OPERATIONS)
def test_index_invariants(policy, num_slots, operations):
    """Eviction takes leaves only, never a pin, never a reserved slot; it fails only when nothing may go."""
    index = TierIndex(num_slots, 1000, policy)
    reserved: list[int] = []
    now = 0.0
    for name, number, amount in operations:
        now += amount
        entries = sorted(index.entries.values(), key=lambda entry: entry.key)
        entry = entries[number % len(entries)] if entries else None
        if name == "reserve":
            parents = {e.parent for e in entries}
            victims = [e for e in entries if not e.num_pins and e.key not in parents]
            num_free = index.num_free
            got = index.reserve()
            if got is None:
                assert not num_free and not victims
            else:
                slot, victim = got
                reserved.append(slot)
                assert (victim is None) == (num_free > 0)
                if victim is not None:
                    assert victim in victims and victim.slot == slot
                    assert not any(e.parent == victim.key for e in index.entries.values())
        elif name == "publish" and reserved:
            path = PATHS[number % len(PATHS)]
            if key(*path) not in index:
                index.publish(key(*path), key(*path[:-1]), reserved.pop(), 0.01, now)
        elif name == "give_back" and reserved:
            index.give_back(reserved.pop())
        elif entry is not None and name == "touch":
            index.touch(entry, now)
        elif entry is not None and name == "pin":
            index.pin(entry)
        elif entry is not None and name == "unpin" and entry.num_pins:
            index.unpin(entry)
        elif entry is not None and name == "remove" and not entry.num_pins:
            index.remove(entry.key)
        elif entry is not None and name == "cost":
            index.set_cost(entry.key, amount)
        elif name == "coldest":
            index.coldest(2)
        check_index(index, set(reserved))


def fill(policy: str, costs_s: list[float], uses: list[int]) -> list[int]:
    """Blocks without a tree, used so often; in which order do they go?"""
    index = TierIndex(len(costs_s), 1 << 20, policy)
    for n, cost_s in enumerate(costs_s):
        slot, _ = index.reserve()
        index.publish(key(n), b"", slot, cost_s, 0.0)
    for n, count in enumerate(uses):
        for _ in range(count):
            index.touch(index.get(key(n)), 0.0)
    victims = index.coldest(len(costs_s))
    return [n for victim in victims for n in range(len(costs_s)) if victim.key == key(n)]


def test_what_each_policy_values():
    assert fill("lru", [9.0, 1.0, 1.0], [0, 0, 0]) == [0, 1, 2]
    assert fill("lfu", [1.0, 9.0, 1.0], [2, 0, 1]) == [1, 2, 0]
    assert fill("gdsf", [1.0, 9.0, 3.0], [2, 0, 0]) == [0, 2, 1] or fill("gdsf", [1.0, 9.0, 3.0], [2, 0, 0]) == [
        2,
        0,
        1,
    ]
    assert fill("gdsf", [1.0, 9.0, 4.0], [2, 0, 0]) == [0, 2, 1]


def test_a_copy_below_makes_a_block_cheap():
    """Cost-aware eviction gives up first what can be had again quickly."""
    index = TierIndex(2, 1 << 20, "gdsf")
    for n in range(2):
        slot, _ = index.reserve()
        index.publish(key(n), b"", slot, 1.0, 0.0)
    index.set_cost(key(1), 0.001)
    assert index.reserve()[1].key == key(1)


@pytest.mark.parametrize("policy", ["lfu", "gdsf"])
def test_old_heat_does_not_last_for_ever(policy):
    """A block that was hot long ago goes before one that is used now and then: heat halves, the age clock rises."""
    index = TierIndex(4, 1 << 20, policy)
    slot, _ = index.reserve()
    hot = index.publish(key(0), b"", slot, 1.0, 0.0)
    for _ in range(50):
        index.touch(hot, 0.0)
    for n in range(1, 400):
        slot, _ = index.reserve()
        index.publish(key(n), b"", slot, 1.0, n * 60.0)
    assert key(0) not in index


def test_ghost_lists_choose_the_policy_that_saves_most():
    """A scan of blocks used once, beside dear ones used over and over: recency loses, cost wins and is promoted."""
    choice = PolicyChoice(64 * 16, 1 << 20, window_s=10.0, min_samples=100)
    sampled = [k for n in range(40_000) if int.from_bytes((k := key(n))[:4], "little") % 16 == 0]
    hot, scan = sampled[:32], iter(sampled[32:])
    assert choice.best("lru", 0.0) is None
    for round_ in range(20):
        for name in hot:
            choice.follow(name, 1.0, round_)
        for _ in range(100):
            choice.follow(next(scan), 0.01, round_)
    assert choice.saved_s["gdsf"] > choice.saved_s["lru"]
    assert choice.best("lru", 5.0) is None, "the window is not over"
    assert choice.best("lru", 20.0) == "gdsf"
    assert choice.best("lru", 40.0) is None, "a new window has no samples yet"


def test_a_near_tie_changes_nothing():
    choice = PolicyChoice(1024, 1 << 20, window_s=1.0, min_samples=1)
    choice.best("lru", 0.0)
    choice._num_samples = 100
    choice.saved_s = {"lru": 100.0, "gdsf": 104.0, "lfu": 90.0}
    assert choice.best("lru", 2.0) is None
