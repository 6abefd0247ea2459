"""Other machines' pools at this one's door: served from its own tiers alone, and what they bring goes nowhere else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.test_kv_pool import World, chain, disk, parents_of, remote

from penstock.core.kv_pool import READ, WRITE
from penstock.core.tiering import (
    IN_HOST,
    NO_TIER,
    WRITE_BACK,
    WRITE_POLICIES,
    WRITE_SELECTIVE,
    WRITE_THROUGH,
    Fetch,
    Filled,
    Match,
    Release,
    Reserve,
)


def get(world: World, id_: int, keys, peer: str = "p"):
    """As a listener asks for a peer: it knows neither parents nor costs."""
    world.pool.peers.add(peer)
    world.say(peer, Fetch(id_, tuple(keys), (b"",) * len(keys), (0.0,) * len(keys)))
    world.settle()
    return world.inbox[peer, id_]


def jobs_of(world: World, tier: str) -> list[str]:
    return [kind for name, kind, _ in world.log if name == tier]


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), writes=st.tuples(st.sampled_from(WRITE_POLICIES), st.sampled_from(WRITE_POLICIES)))
def test_peers_alone_make_no_work_for_a_shared_tier(seed, writes):
    """Whatever two peers ask for and bring, in any order, while slots are short and the disk fails: nothing is found,
    read or written elsewhere; and nothing is held in the end."""
    dice = random.Random(seed)
    world = World([disk((10, 10), writes[0]), remote(writes[1])], (5, 5), lease_s=30.0)
    open_ids: dict[str, list[tuple[type, int, int]]] = {"p": [], "q": []}
    for id_ in range(120):
        peer = dice.choice("pq")
        world.pool.peers.add(peer)
        first = dice.randrange(3)
        keys = [k for g in range(2) for k in chain(dice.randrange(4), 8, g)[first : first + dice.randrange(1, 6)]]
        action = dice.randrange(9)
        if action < 3:
            answer = world.say(peer, Reserve(id_, tuple(keys), parents_of(keys), (0.01,) * len(keys)))
            for key, slot in zip(keys, answer.slots, strict=True):
                if slot:
                    world.arena[key[-1], slot] = key
            open_ids[peer].append((Filled, id_, len(keys)))
        elif action < 5:
            world.say(peer, Fetch(id_, tuple(keys), (b"",) * len(keys), (0.0,) * len(keys)))
            open_ids[peer].append((Release, id_, 0))
        elif action == 5:
            world.say(peer, Match(id_, tuple(keys)))
        elif action == 6 and open_ids[peer]:
            kind, old, num = open_ids[peer].pop(dice.randrange(len(open_ids[peer])))
            world.say(peer, Filled(old, (True,) * num) if kind is Filled else Release(old))
        elif action == 7:
            world.tick(dice.choice([0.1, 5.0, 20.0]))
        elif dice.random() < 0.3:
            world.pool.lost(peer, world.now)
            open_ids[peer].clear()
            world.take([])
        for _ in range(dice.randrange(3)):
            world.run_job("disk", dice.choice(["good"] * 8 + ["missing", "error"]))
        assert not world.queues["remote"] and not world.pool.lower[1].reads and not world.pool.lower[1].writes
    for peer in open_ids:
        world.pool.lost(peer, world.now)
    world.take([])
    world.settle()
    pool = world.pool
    assert not pool.num_held and not pool._filling and not pool._promotions and not pool._lookups
    assert not any(entry.num_pins for index in pool.host for entry in index.entries.values())


def test_a_peer_gets_what_host_memory_and_disk_have():
    world = World([disk()], host_blocks=(4, 4))
    keys = chain(1, 8)
    world.save("a", 1, keys[:4])
    world.settle()
    world.save("a", 2, keys[4:])  # the first four are on disk only
    world.settle()
    world.pool.peers.add("p")
    assert set(world.say("p", Match(3, tuple(keys))).tiers) == {IN_HOST, IN_HOST + 1}
    found = get(world, 4, keys[:3])
    assert all(found.slots) and found.final
    entry = world.pool.host[0].get(keys[2])
    assert entry.parent == keys[1] and entry.recompute_s == 0.01, "as the pool knew it, not as the peer said"
    world.say("p", Release(4))
    assert not world.pool.num_held


def test_a_peer_is_not_served_from_what_this_pool_reads_elsewhere():
    world = World([remote()])
    keys = chain(1, 3)
    world.stores["remote"] = dict.fromkeys(keys, (b"", 0.01))
    world.say("a", Match(1, tuple(keys)))
    world.settle()
    assert world.inbox["a", 1].tiers == (IN_HOST + 1,) * 3
    world.pool.peers.add("p")
    assert world.say("p", Match(2, tuple(keys))).tiers == (NO_TIER,) * 3
    world.say("a", Fetch(3, tuple(keys), parents_of(keys), (0.01,) * 3))  # they are on their way now
    assert world.say("p", Fetch(4, tuple(keys), (b"",) * 3, (0.0,) * 3)).slots == (0, 0, 0)
    assert world.inbox["p", 4].final, "two pools that wait for each other would wait for ever"
    world.settle()
    assert all(world.inbox["a", 3].slots)
    assert all(get(world, 5, keys).slots), "now they are in its own memory"


def test_a_peer_does_not_wait_for_another_tier_when_the_disk_fails():
    world = World([disk(), remote()], host_blocks=(3, 3))
    keys = chain(1, 3)
    world.save("a", 1, keys)
    world.settle()
    world.save("a", 2, chain(2, 3))  # pushes them out
    world.settle()
    world.pool.peers.add("p")
    for source, id_ in (("p", 3), ("a", 4)):
        world.say(source, Fetch(id_, tuple(keys), parents_of(keys), (0.01,) * 3))
    while world.run_job("disk", "missing"):
        pass
    assert world.inbox["p", 3].final and not any(world.inbox["p", 3].slots)
    assert not world.inbox["a", 4].final
    world.settle()
    assert all(world.inbox["a", 4].slots), "the engine has them from the remote store"


@pytest.mark.parametrize("write", WRITE_POLICIES)
def test_what_a_peer_has_put_is_kept_here_alone(write):
    """Under this pool's own policy on disk; never on to its own remote tier, however often it is used."""
    world = World([disk((50, 50), write), remote(write)], host_blocks=(6, 6))
    world.pool.peers.add("p")
    keys = chain(1, 4)
    assert world.save("p", 1, keys) == keys
    assert all(world.fetch("a", 2, keys).slots) and all(get(world, 3, keys).slots)
    for source, id_ in (("a", 2), ("p", 3)):
        world.say(source, Release(id_))
    for root in range(10, 20):  # pushes everything out
        world.save("p", 10 + root, chain(root, 3))
    world.settle()
    assert WRITE in jobs_of(world, "disk") and WRITE not in jobs_of(world, "remote")
    world.save("a", 40, chain(30, 3))
    assert all(world.fetch("a", 41, chain(30, 3)).slots)
    if write != WRITE_BACK:
        assert WRITE in jobs_of(world, "remote"), "what engines compute does go there"


def test_reads_by_a_peer_are_no_reason_to_write_elsewhere():
    world = World([remote(WRITE_SELECTIVE)])
    keys = chain(1, 3)
    world.save("a", 1, keys)
    for id_ in range(2, 6):
        get(world, id_, keys)
    assert jobs_of(world, "remote") == []
    world.fetch("a", 9, keys)
    assert set(jobs_of(world, "remote")) == {WRITE}


def test_a_peer_that_is_gone_holds_nothing():
    world = World([disk(write=WRITE_THROUGH)], host_blocks=(4, 4))
    keys = chain(1, 4)
    world.save("a", 1, keys[:2])
    assert sum(map(bool, get(world, 2, keys[:2]).slots)) == 2
    world.say("p", Reserve(3, tuple(keys[2:]), parents_of(keys[2:]), (0.01,) * 2))
    assert world.pool.num_held == 2
    world.pool.lost("p", world.now)
    world.take([])
    world.settle()
    assert not world.pool.num_held and not world.pool.peers and READ not in jobs_of(world, "disk")
    assert len(world.save("a", 4, chain(2, 4))) == 4
