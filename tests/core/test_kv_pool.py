"""The pool under engines that come, go and die, and stores that fail: whatever the order, slots hold what was promised.

The arena is pretended: which key lies in which slot. Stores do their jobs when the test says so, per tier in order.
"""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.eviction import AUTO, POLICIES
from penstock.core.kv_pool import DELETE, FIND, READ, WRITE, KVPool
from penstock.core.tiering import (
    IN_HOST,
    NO_TIER,
    WRITE_BACK,
    WRITE_POLICIES,
    WRITE_SELECTIVE,
    WRITE_THROUGH,
    Expired,
    Fetch,
    Fetched,
    Filled,
    Match,
    Matched,
    Release,
    Reserve,
    Reserved,
    TierSettings,
    block_key,
    key_group,
)

SIZES = (1 << 20, 1 << 18)  # record bytes of two KV groups


def chain(root: int, num: int, group: int = 0) -> list[bytes]:
    return [block_key(bytes((root, n)) + bytes(14), group) for n in range(num)]


def parents_of(keys: list[bytes]) -> tuple[bytes, ...]:
    """Of keys as `chain` makes them."""
    return tuple(b"" if not key[1] else key[:1] + bytes((key[1] - 1,)) + key[2:] for key in keys)


class World:
    """One pool, its pretended arena and stores. Checks everything a slot is used for."""

    def __init__(self, tiers, host_blocks=(6, 6), policy="lru", lease_s=100.0) -> None:
        self.pool = KVPool(SIZES, host_blocks, tiers, policy, lease_s)
        self.shared = {tier.name: tier.num_blocks is None for tier in tiers}
        self.arena: dict[tuple[int, int], object] = {}
        self.stores: dict[str, dict[bytes, tuple[bytes, float]]] = {tier.name: {} for tier in tiers}
        self.queues: dict[str, deque] = {tier.name: deque() for tier in tiers}
        self.inbox: dict[tuple[str, int], object] = {}  # last answer per (source, id)
        self.now = 0.0
        self.log: list[tuple[str, str, int]] = []

    def say(self, source, message):
        self.take(self.pool.handle(source, message, self.now))
        return self.inbox.get((source, message.id))

    def take(self, answers) -> None:
        for source, message in answers:
            self.inbox[source, message.id] = message
        for job in self.pool.jobs():
            self.queues[job.tier].append(job)
        check(self)

    def run_job(self, tier, outcome="good") -> bool:
        """The next job of a tier; outcome "good", "missing" (nothing is there) or "error" (the store is in trouble)."""
        if not self.queues[tier]:
            return False
        job, store = self.queues[tier].popleft(), self.stores[tier]
        self.log.append((tier, job.kind, len(job.keys)))
        ok = [outcome == "good"] * len(job.keys)
        for i, key in enumerate(job.keys):
            place = (key_group(key), job.slots[i]) if job.slots else None
            if outcome == "error" and job.kind != DELETE:  # forgetting a block cannot fail
                continue
            if job.kind == READ:
                ok[i] = ok[i] and key in store
                if not ok[i]:
                    store.pop(key, None)  # a store drops what is damaged
                self.arena[place] = key if ok[i] else "torn"
            elif job.kind == WRITE:
                assert self.arena[place] == key, "a slot was written to a store that holds something else"
                if ok[i]:
                    store[key] = (job.parents[i], job.costs_s[i])
            elif job.kind == DELETE:
                store.pop(key, None)
            else:
                ok[i] = key in store
        error = "in trouble" if outcome == "error" else None
        self.take(self.pool.job_done(job.id, ok, 0.001 * len(job.keys), self.now, error))
        return True

    def settle(self) -> None:
        while any(self.queues.values()):
            for tier in self.queues:
                self.run_job(tier)

    def tick(self, seconds=0.0) -> None:
        self.now += seconds
        self.take(self.pool.tick(self.now))

    def save(self, source, id_, keys, cost_s=0.01) -> list[bytes]:
        """Reserve, fill, say so: the keys that got slots."""
        answer = self.say(source, Reserve(id_, tuple(keys), parents_of(keys), (cost_s,) * len(keys)))
        for key, slot in zip(keys, answer.slots, strict=True):
            if slot:
                self.arena[key_group(key), slot] = key
        self.say(source, Filled(id_, tuple(map(bool, answer.slots))))
        return [key for key, slot in zip(keys, answer.slots, strict=True) if slot]

    def fetch(self, source, id_, keys) -> Fetched:
        self.say(source, Fetch(id_, tuple(keys), parents_of(keys), (0.01,) * len(keys)))
        self.settle()
        return self.inbox[source, id_]


def check(world: World) -> None:
    """Pins and reserved slots, counted anew from holds, promotions and jobs; slots given out hold their keys."""
    pool = world.pool
    pins: Counter[bytes] = Counter()
    reserved: list[tuple[int, int]] = []
    for hold in pool._holds.values():
        for key, slot in zip(hold.keys, hold.slots, strict=True):
            if slot and hold.is_fetch:
                pins[key] += 1
                assert pool.host[key_group(key)].entries[key].slot == slot
                assert world.arena[key_group(key), slot] == key, "an engine would load another block"
            elif slot:
                reserved.append((key_group(key), slot))
                assert key in pool._filling
        waiting = sum(w[0] is hold for p in pool._promotions.values() for w in p.waiters)
        assert hold.num_pending == waiting
    reserved += [(key_group(p.key), p.slot) for p in pool._promotions.values()]
    lower_pins: Counter[tuple[str, bytes]] = Counter()
    for tier in pool.lower:
        for key in tier.writing:
            pins[key] += 1
    for promotion in pool._promotions.values():
        lower_pins[pool.lower[promotion.tier].name, promotion.key] += 1
    assert len(set(reserved)) == len(reserved), "one slot for two blocks"
    for group, index in enumerate(pool.host):
        mine = sorted(slot for g, slot in reserved if g == group)
        resident = [entry.slot for entry in index.entries.values()]
        assert sorted([*index._free, *mine, *resident]) == list(range(1, index.num_slots + 1))
        for entry in index.entries.values():
            assert entry.num_pins == pins[entry.key], entry.key
    for tier in pool.lower:
        for group, index in enumerate(tier.indexes or []):
            writing = [slot for key, slot in tier.writing.items() if key_group(key) == group]
            resident = [entry.slot for entry in index.entries.values()]
            assert sorted([*index._free, *writing, *resident]) == list(range(1, index.num_slots + 1))
            for entry in index.entries.values():
                assert entry.num_pins == lower_pins[tier.name, entry.key]
    assert pool._harmful <= {key for index in pool.host for key in index.entries}


def disk(num_blocks=(20, 20), write=WRITE_THROUGH, **more) -> TierSettings:
    return TierSettings("disk", num_blocks, write, batch_bytes=2 << 20, **more)


def remote(write=WRITE_THROUGH, **more) -> TierSettings:
    return TierSettings("remote", None, write, batch_bytes=2 << 20, **more)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    writes=st.tuples(st.sampled_from(WRITE_POLICIES), st.sampled_from(WRITE_POLICIES)),
    policy=st.sampled_from([*POLICIES, AUTO]),
    host=st.integers(1, 8),
)
def test_any_order_ends_with_nothing_held(seed, writes, policy, host):
    """Random messages of two engines and a peer, deaths, leases that end, failing stores: `check` after each; nothing
    leaks."""
    dice = random.Random(seed)
    world = World([disk((10, 10), writes[0]), remote(writes[1])], (host, host), policy, lease_s=30.0)
    open_ids: dict[str, list] = {"a": [], "b": [], "c": []}
    for id_ in range(120):
        source = dice.choice("abc")
        world.pool.peers.add("c")
        first = dice.randrange(3)
        keys = [k for g in range(2) for k in chain(dice.randrange(4), 8, g)[first : first + dice.randrange(1, 6)]]
        action = dice.randrange(10)
        if action < 2:
            answer = world.say(source, Reserve(id_, tuple(keys), parents_of(keys), (0.01,) * len(keys)))
            assert isinstance(answer, Reserved)
            for key, slot in zip(keys, answer.slots, strict=True):
                if slot:
                    world.arena[key_group(key), slot] = key
            open_ids[source].append((Filled, id_, len(keys)))
        elif action < 4:
            world.say(source, Fetch(id_, tuple(keys), parents_of(keys), (0.01,) * len(keys)))
            open_ids[source].append((Release, id_, 0))
        elif action == 4:
            world.say(source, Match(id_, tuple(keys)))
        elif action < 7 and open_ids[source]:
            kind, old, num = open_ids[source].pop(dice.randrange(len(open_ids[source])))
            if kind is Filled and dice.random() < 0.8:
                world.say(source, Filled(old, tuple(dice.random() < 0.9 for _ in range(num))))
                world.say(source, Filled(old, (True,) * num))  # doubled: changes nothing
            else:
                world.say(source, Release(old, failed=dice.random() < 0.2))
        elif action == 7:
            world.tick(dice.choice([0.1, 5.0, 20.0]))
        elif action == 8 and dice.random() < 0.3:
            world.pool.lost(source, world.now)
            open_ids[source].clear()
            world.take([])
        for _ in range(dice.randrange(3)):
            world.run_job(dice.choice(["disk", "remote"]), dice.choice(["good"] * 8 + ["missing", "error"]))
    for source in open_ids:
        world.pool.lost(source, world.now)
    world.take([])
    world.settle()
    pool = world.pool
    assert not pool.num_held and not pool._filling and not pool._promotions and not pool._jobs and not pool._lookups
    for index in [*pool.host, *pool.lower[0].indexes]:
        assert not index.num_reserved
        assert not any(entry.num_pins for entry in index.entries.values())
    kept = {key for index in pool.lower[0].indexes for key in index.entries}
    assert set(world.stores["disk"]) <= kept, "the disk holds blocks that nobody knows of"


def test_what_was_saved_is_found_and_fetched():
    world = World([disk(write=WRITE_SELECTIVE)])
    keys = chain(1, 4)
    assert world.save("a", 1, keys) == keys
    assert world.say("b", Match(2, (*keys, *chain(2, 1)))).tiers == (IN_HOST,) * 4 + (NO_TIER,)
    answer = world.fetch("b", 3, keys)
    assert answer.final and all(answer.slots)
    assert not world.stores["disk"] or set(world.stores["disk"]) == set(keys)
    world.say("b", Release(3))
    assert not world.pool.num_held
    assert world.save("b", 4, keys) == [], "it is there already"


def test_selective_writes_wait_for_the_second_request():
    world = World([disk(write=WRITE_SELECTIVE)])
    keys = chain(1, 3)
    world.save("a", 1, keys)
    world.settle()
    assert not world.stores["disk"]
    world.fetch("b", 2, keys)
    assert set(world.stores["disk"]) == set(keys)


def test_write_back_stores_what_is_about_to_go():
    world = World([disk((64, 64), WRITE_BACK)], host_blocks=(16, 16))
    saved = []
    for n in range(12):
        saved += world.save("a", n, chain(n, 4))
        world.settle()
    kept = set(world.pool.host[0].entries) | set(world.stores["disk"])
    assert set(saved) <= kept
    assert len(world.stores["disk"]) > 8


def test_lower_tiers_serve_what_host_memory_has_lost():
    """All tiers are matched at once, each reads only what the faster ones lack, and what was read is in host memory."""
    world = World([disk(), remote()], host_blocks=(4, 4))
    old, new = chain(1, 4), chain(2, 3)
    world.save("a", 1, old)
    world.settle()
    world.save("a", 2, new)
    world.settle()
    found = world.say("a", Match(3, (*old, *new))).tiers
    assert set(found) == {IN_HOST, IN_HOST + 1}
    assert found[0] == IN_HOST and found[3] == IN_HOST + 1, "leaves went first"
    world.log.clear()
    answer = world.fetch("a", 4, old)
    assert answer.final and all(answer.slots)
    assert sum(num for tier, kind, num in world.log if kind == READ) == found[:4].count(IN_HOST + 1)
    assert not [entry for entry in world.log if entry[:2] == ("remote", READ)]


def test_a_fetch_that_does_not_fit_gets_its_beginning():
    world = World([disk()], host_blocks=(4, 4))
    keys = chain(1, 4)
    world.save("a", 1, keys)
    world.settle()
    more = chain(1, 8)[4:]
    world.save("a", 2, more)
    world.settle()
    answer = world.fetch("a", 3, chain(1, 8))
    assert answer.final
    assert [bool(slot) for slot in answer.slots] == [True] * 4 + [False] * 4


def test_a_block_comes_into_host_memory_one_way_at_a_time():
    """Not from disk while an engine fills its slot, not from an engine while it comes from disk; one read for all."""
    world = World([disk()], host_blocks=(4, 4))
    keys = chain(1, 2)
    world.save("a", 1, keys)
    world.settle()
    world.save("a", 2, chain(2, 4))
    world.settle()
    asked = tuple(keys), parents_of(keys), (0.01, 0.01)
    filling = world.say("a", Reserve(3, *asked))
    assert all(filling.slots)
    assert world.say("b", Fetch(4, *asked)) == Fetched(4, (0, 0), True, 100.0)
    for key, slot in zip(keys, filling.slots, strict=True):
        world.arena[0, slot] = key
    world.say("a", Filled(3, (True, True)))
    world.save("a", 5, chain(3, 4))
    world.settle()
    world.log.clear()
    for n, source in enumerate("bcd"):
        assert not world.say(source, Fetch(10 + n, *asked)).final
    assert world.say("a", Reserve(6, *asked)).slots == (0, 0)
    world.settle()
    assert sum(num for _, kind, num in world.log if kind == READ) == 2
    assert all(all(world.inbox[source, 10 + n].slots) for n, source in enumerate("bcd"))


def test_other_machines_blocks_are_found_by_asking():
    world = World([disk(), remote()])
    keys = chain(1, 3)
    world.stores["remote"] = dict.fromkeys(keys[:2], (b"", 0.0))
    assert world.say("a", Match(1, tuple(keys))) is None, "the answer waits for the remote store"
    assert world.queues["remote"][0].kind == FIND
    world.settle()
    assert world.inbox["a", 1] == Matched(1, (IN_HOST + 2, IN_HOST + 2, NO_TIER), world.inbox["a", 1].rates)
    answer = world.fetch("a", 2, keys[:2])
    assert answer.final and all(answer.slots)


@pytest.mark.parametrize("tier", ["disk", "remote"])
def test_a_tier_in_trouble_pauses_and_says_so_once(tier):
    """Its reads become misses at once, others serve what they have; it is tried again later, ever later."""
    world = World([disk() if tier == "disk" else remote()], host_blocks=(2, 2))
    keys = chain(1, 2)
    world.save("a", 1, keys)
    world.settle()
    world.save("a", 2, chain(2, 2))
    world.settle()
    pauses = []
    for n in range(3, 6):
        world.say("a", Fetch(n, tuple(keys), parents_of(keys), (0.01, 0.01)))
        while world.run_job(tier, "error"):
            pass
        answer = world.inbox["a", n]
        assert answer.final and answer.slots == (0, 0)
        world.say("a", Release(n))
        assert world.say("a", Match(100 + n, tuple(keys))).tiers == (NO_TIER, NO_TIER), "off: not even asked"
        lower = world.pool.lower[0]
        pauses.append(lower.failed_until_s - world.now)
        world.tick(pauses[-1])
    assert pauses == [10.0, 20.0, 40.0]
    events = world.pool.events()
    assert [event.kind for event in events] == ["failed"]
    assert "in trouble" in events[0].text and tier in events[0].text
    answer = world.fetch("a", 9, keys)
    assert all(answer.slots)
    assert [event.kind for event in world.pool.events()] == ["on"]


def test_a_full_disk_still_reads():
    world = World([disk()], host_blocks=(3, 3))
    keys = chain(1, 3)
    world.save("a", 1, keys)
    world.settle()
    world.save("a", 2, chain(2, 3))
    while world.run_job("disk", "error"):
        pass
    assert [event.kind for event in world.pool.events()] == ["failed"]
    answer = world.fetch("a", 3, keys)
    assert all(answer.slots)
    assert not any(kind == WRITE for _, kind, _ in world.log[-2:])


def test_a_damaged_block_is_a_miss_and_is_forgotten():
    world = World([disk()], host_blocks=(3, 3))
    keys = chain(1, 3)
    world.save("a", 1, keys)
    world.settle()
    world.save("a", 2, chain(2, 3))
    world.settle()
    world.stores["disk"].pop(keys[1])
    answer = world.fetch("a", 3, keys)
    assert [bool(slot) for slot in answer.slots] == [True, False, True]
    assert world.pool.lower[0].counts.num_bad == 1
    assert keys[1] not in world.pool.lower[0].indexes[0]


def test_a_block_that_failed_its_checksum_is_not_given_out_again():
    """Even while another engine has it pinned."""
    world = World([disk(write=WRITE_BACK)])
    keys = chain(1, 2)
    world.save("a", 1, keys)
    world.fetch("a", 2, keys)
    world.fetch("b", 3, keys)
    world.say("a", Release(2, failed=True))
    assert world.say("c", Match(4, tuple(keys))).tiers == (NO_TIER, NO_TIER)
    assert world.fetch("c", 5, keys).slots == (0, 0)
    world.say("b", Release(3))
    assert not len(world.pool.host[0])
    assert world.save("c", 6, keys) == keys


def test_leases_end_what_nobody_releases():
    world = World([disk()], lease_s=30.0)
    keys = chain(1, 2)
    world.save("a", 1, keys)
    world.fetch("a", 2, keys)
    world.say("b", Reserve(3, tuple(chain(2, 2)), parents_of(chain(2, 2)), (0.0, 0.0)))
    world.tick(29.0)
    assert world.pool.num_held == 2
    world.tick(1.0)
    assert world.pool.num_held == 0
    assert world.inbox["a", 2] == Expired(2) and world.inbox["b", 3] == Expired(3)
    world.say("b", Filled(3, (True, True)))
    assert chain(2, 2)[0] not in world.pool.host[0], "filled too late: the slots are somebody else's"


def test_reads_that_nobody_waits_for_are_not_done():
    world = World([disk(max_jobs=1)], host_blocks=(8, 8))
    for n in range(3):
        world.save("a", n, chain(n, 8))
        world.settle()
    keys = chain(0, 8)
    world.log.clear()
    world.say("a", Fetch(10, tuple(keys), parents_of(keys), (0.01,) * 8))
    world.say("a", Release(10))
    world.settle()
    assert sum(num for _, kind, num in world.log if kind == READ) <= 2, "only the batch that was under way"


def test_a_restart_adopts_what_the_disk_has():
    world = World([disk((2, 2))])
    records = [(key, parent, 0.5) for key, parent in zip(chain(1, 3), parents_of(chain(1, 3)), strict=True)]
    world.pool.adopt("disk", records, 0.0)
    for key, parent, cost_s in records:
        world.stores["disk"][key] = parent, cost_s
    world.take([])
    world.settle()
    assert set(world.stores["disk"]) == set(chain(1, 2)), "what has no room is deleted"
    assert world.say("a", Match(1, tuple(chain(1, 3)))).tiers == (IN_HOST + 1, IN_HOST + 1, NO_TIER)


def test_a_tier_that_takes_more_than_it_saves_turns_itself_off():
    """Reads slower than recomputing: off, with the figures; later tried again."""
    world = World([disk((200, 200), retry_s=10.0)], host_blocks=(4, 4))
    lower = world.pool.lower[0]
    lower.worth.min_uses, lower.worth.window_s = 8, 10.0
    for n in range(6):
        world.save("a", n, chain(n, 4), cost_s=0.0001)
        world.settle()
    world.tick()
    for n in range(10, 16):
        keys = chain(n - 10, 4)
        world.say("a", Match(100 + n, tuple(keys)))
        world.say("a", Fetch(n, tuple(keys), parents_of(keys), (0.0001,) * 4))
        world.settle()
        world.say("a", Release(n))
    world.tick(11.0)
    [event] = [event for event in world.pool.events() if event.kind == "unprofitable"]
    assert "ms" in event.text and "disk" in event.text
    assert world.say("a", Match(999, tuple(chain(0, 4)))).tiers.count(IN_HOST + 1) == 0
    world.tick(60.0)
    assert [event.kind for event in world.pool.events()] == ["on"]
    assert lower.is_on
