"""A router's copy of caches elsewhere: equal to the engine's whatever is lost, doubled or started anew on the way."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.kv_events import encode, replay
from penstock.cluster.publisher import EventPublisher
from penstock.cluster.remote_cache import RemoteCache, SentPrompts
from penstock.config.kv_events import EventSettings
from penstock.core.blocks import BlockPool
from penstock.core.kv_events import KVEventSource
from penstock.core.kv_index import KVIndex
from penstock.core.prefix import chain_start, extend_chain

SIZE = 4
ROOT = chain_start("route", "", SIZE)


def chain(token_ids, root=ROOT):
    hashes: list[bytes] = []
    extend_chain(hashes, root, token_ids, SIZE)
    return hashes


class Publisher:
    """An engine with hashes of its own, which change when it is started anew, and what it has published."""

    def __init__(self, seed, num_kept=10_000):
        self.draw, self.num_kept, self.time_s = random.Random(seed), num_kept, 0.0
        self.restart()

    def restart(self):
        self.root = self.draw.randbytes(16)
        self.held: dict[bytes, bytes] = {}  # its hash -> the router's
        self.kept: list[tuple[int, bytes]] = []
        self.source = KVEventSource("e", 0, self.held.keys, with_tokens=True, batch_s=0.0)

    def act(self):
        """Something happens in the cache; the frames that tell it."""
        token_ids = [self.draw.randrange(3) for _ in range(SIZE * self.draw.randint(1, 4))]
        kind = self.draw.randrange(4)
        if kind < 2:
            mine, routers = chain(token_ids, self.root), chain(token_ids)
            for n, hash_ in enumerate(mine):
                if hash_ not in self.held:
                    self.source.describe(hash_, mine[n - 1] if n else None, token_ids[n * SIZE : (n + 1) * SIZE])
                    self.held[hash_] = routers[n]
                    self.source.stored(hash_)
        elif kind == 2 and self.held:
            leaf = list(self.held)[-1]
            del self.held[leaf]
            self.source.removed(leaf)
        elif self.held:
            self.held.clear()
            self.source.cleared()
        events = self.source.take(0.0)
        if events is None:
            return None
        self.time_s += 1.0
        frames = encode(events, self.time_s)
        self.kept = [*self.kept, (events.seq, frames[2])][-self.num_kept :]
        return frames

    def replay(self, cache):
        asked = [b"client", b"", cache.wanted.to_bytes(8, "big")]
        return [told for frames in replay(self.kept, asked) for told in cache.replayed(frames[2:])]


class Router:
    """An index that is fed with what a RemoteCache gives."""

    def __init__(self):
        self.index = KVIndex(1000)
        self.index.add("e")

    def feed(self, events):
        for each in events:
            assert self.index.apply(each, 0.0) is None, "a gap in what is told without gaps"

    def holds(self, hashes):
        return {hash_ for hash_ in hashes if self.index.holders(hash_)}


@given(st.integers(0, 2**32), st.lists(st.sampled_from("....ldr"), max_size=60))
@settings(deadline=None, max_examples=150)
def test_a_replay_makes_up_for_what_was_lost(seed, fates):
    """l: lost, d: doubled, r: the engine is started anew. In the end, and after one more batch, both are equal."""
    publisher, router = Publisher(seed), Router()
    cache = RemoteCache("e", ROOT, SIZE, can_replay=True)
    seen = set()
    for fate in [*fates, "."]:
        if fate == "r":
            publisher.restart()
        frames = publisher.act()
        while fates and frames is None:
            frames = publisher.act()
        seen |= set(publisher.held.values())
        if frames is None or fate == "l":
            continue
        router.feed(cache.told(frames))
        if cache.wanted is not None:
            router.feed(publisher.replay(cache))
        if fate == "d" and cache.wanted is None:
            router.feed(cache.replayed(frames))
    if fates:
        while (frames := publisher.act()) is None:
            pass
        router.feed(cache.told(frames))
        seen |= set(publisher.held.values())
        if cache.wanted is not None:
            router.feed(publisher.replay(cache))
        assert router.holds(seen) == set(publisher.held.values())
        assert cache.num_blocks == len(publisher.held)
    again = Router()
    again.feed([cache.everything()])
    assert again.holds(seen) == router.holds(seen)


@pytest.mark.parametrize("comes_late", [False, True])
def test_a_new_start_is_seen_also_by_who_knows_the_last_life_from_a_replay_only(comes_late):
    """What was published before the replay may come after it: that is no new start."""
    publisher, router = Publisher(3), Router()
    cache = RemoteCache("e", ROOT, SIZE, can_replay=True)
    seen = set()
    while not publisher.held or len(publisher.kept) < 5:
        publisher.act()
        seen |= set(publisher.held.values())
    router.feed(publisher.replay(cache))
    assert router.holds(seen) == set(publisher.held.values()) != set()
    if comes_late:
        seq, payload = publisher.kept[1]
        assert cache.told([b"", seq.to_bytes(8, "big"), payload]) == [] and cache.wanted is None
    publisher.restart()
    while (frames := publisher.act()) is None:
        pass
    router.feed(cache.told(frames))
    seen |= set(publisher.held.values())
    assert router.holds(seen) == set(publisher.held.values())


@given(st.integers(0, 2**32), st.lists(st.booleans(), min_size=1, max_size=60), st.booleans())
@settings(deadline=None, max_examples=100)
def test_without_a_replay_nothing_wrong_is_believed(seed, arrives, can_replay):
    """Where past batches are gone, less is known than is true, and nothing that is not."""
    publisher, router = Publisher(seed, num_kept=1), Router()
    cache = RemoteCache("e", ROOT, SIZE, can_replay=can_replay)
    seen = set()
    for does_arrive in [*arrives, True]:
        frames = publisher.act()
        seen |= set(publisher.held.values())
        if frames is None or not does_arrive:
            continue
        router.feed(cache.told(frames))
        if cache.wanted is not None:
            router.feed(publisher.replay(cache))
        assert router.holds(seen) <= set(publisher.held.values())


def test_blocks_of_another_size_are_left_out():
    publisher = Publisher(1)
    cache = RemoteCache("e", ROOT, 2 * SIZE, can_replay=False)
    while cache.num_foreign == 0:
        frames = publisher.act()
        assert frames is None or not any(change.stored for e in cache.told(frames) for change in e.changes)
    assert cache.num_blocks == 0


@given(st.integers(0, 2**32), st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_what_was_sent_is_believed_for_a_while(seed, max_blocks):
    draw, router, now = random.Random(seed), Router(), 0.0
    guess = SentPrompts("e", max_blocks, 10.0)
    until: dict[bytes, float] = {}
    for _ in range(30):
        now += draw.random() * 4
        hashes = chain([draw.randrange(2) for _ in range(SIZE * draw.randint(1, 5))])
        for events in (guess.tick(now), guess.sent(hashes, now)):
            router.feed([] if events is None else [events])
        until |= dict.fromkeys(hashes, now + 10.0)
        held = router.holds(until)
        assert held <= {hash_ for hash_, end in until.items() if end > now} and len(held) <= max_blocks
        assert len(held) >= min(max_blocks, len(hashes)) and (len(hashes) > max_blocks or held >= set(hashes))
        if max_blocks == 30:
            assert len(held) >= min(30, sum(end > now for end in until.values()))
    again = Router()
    again.feed([guess.everything()])
    assert again.holds(until) == router.holds(until)


class Cache:
    """What a publisher needs of an engine's KV cache."""

    def __init__(self):
        self.events_pool = BlockPool(8, leaf_first=True)
        self.source = None

    def tell(self, source):
        self.source = source


def test_published_on_sockets(tmp_path):
    """PUB and ROUTER as vLLM has them: topic, number, payload; past batches for who asks, then the end."""
    settings_ = EventSettings(True, endpoint=f"ipc://{tmp_path}/e", replay_endpoint=f"ipc://{tmp_path}/r", topic="kv")
    cache = Cache()
    publisher = EventPublisher(settings_, "e", cache)
    context = zmq.Context()
    events, asking = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    for socket in (events, asking):
        socket.setsockopt(zmq.RCVTIMEO, 5000)
    try:
        events.setsockopt_string(zmq.SUBSCRIBE, "kv")
        events.connect(settings_.endpoint)
        asking.connect(settings_.replay_endpoint)
        hash_ = hashlib.blake2b(b"x", digest_size=16).digest()
        copy, now = RemoteCache("e", ROOT, SIZE, can_replay=False), 0.0
        for _ in range(200):  # until the subscription has come through
            now += 1.0
            cache.source.describe(hash_, None, [1, 2, 3, 4])
            cache.source.stored(hash_)
            publisher.turn(now)
            if events.poll(20):
                break
        topic, *_ = frames = events.recv_multipart()
        assert topic == b"kv"
        [told] = copy.told(frames)
        assert told.changes[0].hashes == tuple(chain([1, 2, 3, 4]))
        asking.send_multipart([b"", (0).to_bytes(8, "big")])
        asking.send_multipart([b"nonsense"])
        numbers = []
        while not numbers or numbers[-1] >= 0:
            publisher.turn(now)
            if asking.poll(20):
                numbers.append(int.from_bytes(asking.recv_multipart()[2], "big", signed=True))
        assert numbers == [*range(len(numbers) - 1), -1]
    finally:
        context.destroy(linger=0)
        publisher.close()


def test_hashes_are_those_that_placement_asks_for():
    """The chain of events and that of requests are one."""
    token_ids = np.arange(10).tolist()
    assert chain(token_ids[:-1]) == chain(token_ids)[:2]
