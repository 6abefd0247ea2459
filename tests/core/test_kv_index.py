"""The index equals the union of what engines hold: after any events, losses, snapshots, deaths and new lives."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.blocks import BlockPool
from penstock.core.holders import TIER_BITS
from penstock.core.kv_events import TIERS, KVChange, KVEvents, KVEventSource, KVSnapshot, SnapshotRequest, checksum_of
from penstock.core.kv_index import ASK_AGAIN_S, BAN_S, KVIndex, keys_of

ENGINES = ["a", "b", "c"]


def hash_of(n):
    return hashlib.blake2b(str(n).encode(), digest_size=16).digest()


HASHES = [hash_of(n) for n in range(12)]


class Engine:
    """Sets per tier, and the stream that tells of them."""

    def __init__(self, name, life):
        self.name, self.held = name, {"device": set(), "host": set(), "disk": set()}
        self.source = KVEventSource(name, life, lambda: self.held["device"])
        for tier in ("host", "disk"):
            self.source.add_tier(tier, lambda tier=tier: self.held[tier])

    def store(self, hash_, tier):
        if hash_ not in self.held[tier]:
            self.held[tier].add(hash_)
            self.source.stored(hash_, tier)

    def remove(self, hash_, tier):
        if hash_ in self.held[tier]:
            self.held[tier].remove(hash_)
            self.source.removed(hash_, tier)

    def clear(self, tier):
        self.held[tier].clear()
        self.source.cleared(tier)


def expected_blocks(engines, prompt, pool=()):
    """By definition: per engine and tier, of the longest run from the start."""
    out = {}
    for name, engine in engines.items():
        counts = dict.fromkeys(("device", "host", "disk", "remote"), 0)
        for hash_ in prompt:
            tiers = [tier for tier in ("device", "host", "disk") if hash_ in engine.held[tier]]
            if hash_ in pool:
                tiers.append("remote")
            if not tiers:
                break
            counts[tiers[0]] += 1
        out[name] = list(counts.values())
    return out


def agrees(index, engines, pool=()):
    for name, engine in engines.items():
        held = {(h.key, h.tiers) for h in index.holdings(name)}
        truth = {}
        for tier, hashes in engine.held.items():
            for key in keys_of(list(hashes)).tolist() if hashes else []:
                truth[key] = truth.get(key, 0) | TIER_BITS[tier]
        assert held == set(truth.items())
        assert index.held_by(name) == sum(map(len, engine.held.values()))
    for start in range(0, 12, 3):
        prompt = HASHES[start:] + HASHES[:start]
        blocks = index.match(prompt).blocks
        for name, counts in expected_blocks(engines, prompt, pool).items():
            row = index.rows[name]
            assert [int(blocks[tier][row]) if tier in blocks else 0 for tier in TIERS] == counts


@given(st.integers(0, 2**32), st.floats(0, 0.4), st.floats(0, 0.4))
@settings(deadline=None, max_examples=150)
def test_the_index_equals_the_union_of_the_caches(seed, loss, disorder):
    """Events and snapshots get lost, doubled and late; engines die and start anew: in the end it agrees."""
    draw = random.Random(seed)
    index, lives, now = KVIndex(draw.choice([4, 1000])), dict.fromkeys(ENGINES, 0), 0.0
    engines = {name: Engine(name, 0) for name in ENGINES}
    for name in ENGINES:
        index.add(name, max_blocks=36)
    index.add("pool", shared=True)
    pool, pool_seq = set(), 0
    way = []  # messages that are late

    def deliver(message):
        asked = index.restore(message, now) if isinstance(message, KVSnapshot) else index.apply(message, now)
        if isinstance(asked, SnapshotRequest) and asked.engine in engines and draw.random() >= loss:
            send(engines[asked.engine].source.snapshot())

    def send(message):
        if draw.random() < loss:
            return
        if draw.random() < disorder:
            way.append(message)
        else:
            deliver(message)
        if draw.random() < disorder:
            way.append(message)

    for _ in range(draw.randint(1, 80)):
        now += draw.random() * 0.1
        name, hash_ = draw.choice(ENGINES), draw.choice(HASHES)
        engine, tier = engines[name], draw.choice(("device", "device", "host", "disk"))
        action = draw.random()
        if action < 0.45:
            engine.store(hash_, tier)
        elif action < 0.7:
            engine.remove(hash_, tier)
        elif action < 0.73:
            engine.clear(tier)
        elif action < 0.76:  # it starts anew, with an empty cache and a larger life
            lives[name] += 1
            engines[name] = Engine(name, lives[name])
        elif action < 0.79:  # the router thought it dead
            index.remove(name)
            index.tick(now)
            index.add(name, max_blocks=36)
        elif action < 0.85:
            index.expect(name, HASHES[: draw.randint(0, 12)], now, 0.5)
        elif action < 0.95:
            stored = draw.random() < 0.7
            (pool.add if stored else pool.discard)(hash_)
            index.apply(KVEvents("pool", 0, pool_seq, (KVChange(stored, "host", (hash_,)),)), now)
            pool_seq += 1
        if draw.random() < 0.6 and (events := engine.source.take(now)) is not None:
            send(events)
        if way and draw.random() < 0.5:
            deliver(way.pop(draw.randrange(len(way))))
    loss = disorder = 0.0
    for message in way:
        deliver(message)
    for _ in range(4):  # quiet: what is left is told, what was missed is asked for
        now += max(ASK_AGAIN_S, BAN_S) + 1
        for engine in engines.values():
            engine.store(HASHES[0], "device")
            engine.remove(HASHES[0], "device")
            if (events := engine.source.take(now)) is not None:
                deliver(events)
        for asked in index.tick(now):
            deliver(engines[asked.engine].source.snapshot())
    agrees(index, engines, pool)


def test_what_is_promised_counts_until_it_is_corrected_or_too_old():
    index = KVIndex()
    row = index.add("a")
    index.expect("a", HASHES[:6], 0.0, 10.0)
    assert index.match(HASHES).total[row] == 6 and index.holders(HASHES[0]) == {} and index.held_by("a") == 0
    index.apply(KVEvents("a", 0, 0, (KVChange(True, "device", tuple(HASHES[:3])),)), 1.0)
    index.apply(KVEvents("a", 0, 1, (KVChange(False, "device", (HASHES[2],)),)), 1.0)
    assert index.match(HASHES).total[row] == 2  # the third came and went: the promise is void
    index.tick(10.0)
    assert index.match(HASHES).total[row] == 2 and index.held_by("a") == 2
    assert index.match(HASHES[3:]).total[row] == 0


def test_a_liar_is_cut_off_and_may_come_back():
    """Claims beyond what it can hold, or a snapshot that contradicts itself: nothing it said counts for a minute."""
    index = KVIndex()
    liar, honest = index.add("liar", max_blocks=4), index.add("honest", max_blocks=40)
    for name in ("liar", "honest"):
        index.apply(KVEvents(name, 0, 0, (KVChange(True, "device", tuple(HASHES)),)), 0.0)
    total = index.match(HASHES).total
    assert total[liar] == 0 and total[honest] == 12 and index.num_refused == 1
    index.apply(KVEvents("liar", 0, 1, (KVChange(True, "device", (HASHES[0],)),)), 1.0)
    assert index.match(HASHES).total[liar] == 0 and not index.tick(BAN_S)
    (asked,) = index.tick(BAN_S + ASK_AGAIN_S)
    blocks = (("device", tuple(HASHES[:3])),)
    index.restore(KVSnapshot("liar", 0, 1, blocks, checksum_of(blocks)), BAN_S + 2)
    assert asked.engine == "liar" and index.match(HASHES).total[liar] == 3
    index.restore(KVSnapshot("liar", 0, 2, blocks, 77), BAN_S + 3)
    assert index.match(HASHES).total[liar] == 0 and index.num_refused == 2


def test_the_pool_tells_only_while_somebody_listens():
    """A block pool with and without a listener decides the same; the stream's checksum is that of what it holds."""
    quiet, told = BlockPool(6), BlockPool(6)
    source = KVEventSource("a", 0, lambda: told.index.keys())
    told.listener = source
    draw = random.Random(3)
    for n in range(300):
        for pool in (quiet, told):
            block = pool.allocate(float(n))
            pool.publish(block, hash_of(n % 9), hash_of(n % 9 - 1) if n % 9 else None)
            pool.release(block, -1)
        if draw.random() < 0.02:
            quiet.forget()
            told.forget()
        assert set(quiet.index) == set(told.index)
        if draw.random() < 0.2:
            source.take(n)
            assert source.snapshot().checksum == checksum_of([("device", list(told.index))])


def test_batches_wait_and_full_ones_do_not():
    source = KVEventSource("a", 0, list)
    source.stored(hash_of(0))
    assert source.take(5.0) is not None  # the first after a pause goes at once
    source.stored(hash_of(1))
    assert source.take(5.009) is None and source.due_s == pytest.approx(5.010)
    source.removed(hash_of(0))
    events = source.take(5.010)
    assert [c.stored for c in events.changes] == [True, False] and events.seq == 1
    assert source.take(6.0) is None
    for n in range(4096):
        source.stored(hash_of(n))
    assert len(source.take(5.011).changes[0].hashes) == 4096


def test_gone_engines_are_swept_out():
    """Their slots are given again only when no entry names them."""
    index = KVIndex(50)
    for turn in range(30):
        index.add("a")
        index.add("b")
        for name in ("a", "b")[: 1 + turn % 2]:
            index.apply(KVEvents(name, 0, 0, (KVChange(True, "device", tuple(HASHES)),)), 0.0)
        assert index.match(HASHES).total[index.rows["a"]] == 12
        assert index.match(HASHES).total[index.rows["b"]] == 12 * (turn % 2)
        index.remove("a")
        index.remove("b")
        index.tick(0.0)
    assert index.num_blocks == 0 and index._num_slots <= 5
