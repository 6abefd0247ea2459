"""Two routers before the same servers, on virtual time: either dies, engines die, events and messages are lost.

Real are the routers' minds (Dispatcher, RemoteCache) and the engines (tests/cluster/world.py); pretended are HTTP, by
which a router calls a server and sees its connection break, and the publishers of events, of which any may be lost.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from tests.cluster.world import BLOCK_SIZE, Ask, Setting, World

from penstock.cluster.dispatcher import Dispatcher, Facts
from penstock.cluster.kv_events import encode, replay
from penstock.core.kv_events import KVEventSource
from penstock.core.route_modes import ModeLimits
from penstock.engine.messages import Failed
from penstock.sim.clock import stream
from penstock.sim.mover import LinkFaults
from penstock.sim.wire import LineFaults

NUM_SEEDS = int(os.environ.get("PENSTOCK_FAULT_SEEDS", "150"))
NUM_PARTS = 3
LOOK_S = 0.02
MAX_TRIES = 3
PREFIXES = [[200 + (7 * p + 3 * i) % 91 for i in range(60)] for p in range(3)]
CLOSED = "the connection was closed"


class Servers(World):
    """Engines that are servers of their own: who called one that dies sees its connection close, and nothing else; who
    calls one that is dead is refused.
    """

    def _send(self, ask: Ask) -> None:
        if self.nodes[ask.decode_at].alive:
            super()._send(ask)
        else:
            ask.error = Failed(ask.request_id, 502, CLOSED)

    def kill(self, name: str, revive_s: float | None = None) -> None:
        if self.nodes[name].alive:
            for ask in self.asks.values():
                if ask.decode_at == name and not ask.is_over:
                    ask.error = Failed(ask.request_id, 502, CLOSED)
            super().kill(name, revive_s)


@dataclass
class Call:
    """What a client asked of a router, and the server's share of it."""

    number: int
    prompt: list[int]
    max_tokens: int
    ask: Ask | None = None
    shunned: set[str] = field(default_factory=set)
    num_tries: int = 0
    has_begun: bool = False
    outcome: str = ""


@dataclass
class Publisher:
    """What one life of an engine has published; the newest batches can be asked for again."""

    source: KVEventSource
    kept: deque[tuple[int, bytes]]


class Party:
    """One life of a router's process."""

    def __init__(self, play: Play, name: str) -> None:
        self.play, self.name, self.alive = play, name, True
        names = play.world.names
        self.dispatcher = Dispatcher(
            {name: "prefill" if name.startswith("p") else "decode" for name in names},
            limits=ModeLimits(max_output_on_p=2, max_new_on_d=6),
            publishes=set(names[1:]),  # of one it has to guess what it holds
            lasts_s=0.5,
            seed=play.seed,
        )
        self.calls: list[Call] = []
        self.lives: dict[str, object] = {}  # node by name, as it was when it was met
        self._look()

    def call(self, call: Call) -> None:
        self.calls.append(call)
        self._place(call)

    def _place(self, call: Call) -> None:
        now = self.play.world.clock.now()
        placed = self.dispatcher.place(f"call-{call.number}", call.prompt, call.max_tokens, call.shunned, now)
        call.num_tries += 1
        if placed is None:
            self.dispatcher.ended(f"call-{call.number}", 0, "error", now)
            self._end(call, "no server is left")
        else:
            call.ask = self.play.world.ask(call.prompt, call.max_tokens, placed.engine, placed.prefill_at)

    def _end(self, call: Call, outcome: str) -> None:
        call.outcome = outcome
        self.calls.remove(call)

    def _look(self) -> None:
        """Answers that came, connections that broke, servers that are there or not, events that were missed."""
        if not self.alive:
            return
        world = self.play.world
        now = world.clock.now()
        for name, node in world.nodes.items():
            if self.lives.get(name) is not (node if node.alive else None):
                self.dispatcher.left(name)
                self.lives[name] = node if node.alive else None
                if node.alive:
                    blocks, rows = world.setting.num_blocks, world.setting.max_num_seqs
                    self.dispatcher.joined(name, Facts(BLOCK_SIZE, blocks, rows), now, can_replay=True)
        for call in list(self.calls):
            self._look_at(call, now)
        for name, cache in self.dispatcher.caches.items():
            publisher = self.play.publishers.get(name)
            if cache.wanted is not None and publisher is not None and not self.play.loses():
                for frames in replay(publisher.kept, [b"", b"", cache.wanted.to_bytes(8, "big")]):
                    self.dispatcher.changed(cache.replayed(frames[2:]), now)
        self.dispatcher.tick(now)
        world.clock.call_in(LOOK_S, self._look)

    def _look_at(self, call: Call, now: float) -> None:
        ask, request_id = call.ask, f"call-{call.number}"
        assert ask is not None
        if ask.tokens and not call.has_begun:
            call.has_begun = True
            self.dispatcher.began(request_id, now)
        if ask.finish_reason is not None:
            self.dispatcher.ended(request_id, len(ask.tokens), ask.finish_reason, now)
            self._end(call, "answered")
        elif ask.error is not None and not call.has_begun and call.num_tries < MAX_TRIES:
            self.play.happened["tried again"] += 1
            call.shunned.add(ask.decode_at)
            self._place(call)
        elif ask.error is not None:
            self.dispatcher.ended(request_id, len(ask.tokens), "error", now)
            self._end(call, ask.error.message)

    def told(self, name: str, frames: list[bytes]) -> None:
        """A published batch."""
        cache = self.dispatcher.caches.get(name)
        if self.alive and cache is not None:
            self.dispatcher.changed(cache.told(frames), self.play.world.clock.now())

    def kill(self) -> None:
        """Its clients and its servers see their connections close."""
        self.alive = False
        for call in self.calls:
            call.outcome = CLOSED
            assert call.ask is not None
            self.play.world.cancel(call.ask)


class Play:
    """Two routers, clients and misfortunes of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.draw = seed, stream(seed, "routers")
        choice = self.draw.choice
        lossy = LineFaults(0.001, 0.002, loss=choice([0.0, 0.05]), duplicate=choice([0.0, 0.1]), reorder=0.1)
        setting = Setting(
            num_prefill=choice([1, 2]), num_decode=2, num_blocks=choice([60, 34]), depth=choice([1, 2]),
            tells_peers=True, messages=lossy, links=LinkFaults(breaks=choice([0.0, 0.1])),
        )  # fmt: skip
        self.world = Servers(setting, seed)
        self.events_lost = choice([0.0, 0.1, 0.4])
        self.is_healing = False
        self.publishers: dict[str, Publisher] = {}
        self._published: dict[str, object] = {}
        self.calls: list[Call] = []
        self.happened: Counter[str] = Counter()
        self.parties = {name: Party(self, name) for name in ("r0", "r1")}
        self._publish()

    def _begin(self, name: str) -> None:
        """A router's process starts again, and knows nothing."""
        self.parties[name] = Party(self, name)

    def loses(self) -> bool:
        return not self.is_healing and self.draw.random() < self.events_lost

    def _publish(self) -> None:
        """What the engines' publishers do once a round."""
        for name, node in self.world.nodes.items():
            if not node.alive:
                self.publishers.pop(name, None)
                continue
            if self._published.get(name) is not node:
                self._published[name] = node
                cache = node.scheduler.kv
                source = KVEventSource(name, 0, cache.events_pool.index.keys, with_tokens=True)
                self.publishers[name] = Publisher(source, deque(maxlen=1000))
                cache.tell(source)
            publisher = self.publishers[name]
            events = publisher.source.take(self.world.clock.now())
            if events is not None:
                frames = encode(events, self.world.clock.now())
                publisher.kept.append((events.seq, frames[2]))
                for party in self.parties.values():
                    if not self.loses():
                        party.told(name, frames)
        self.world.clock.call_in(0.005, self._publish)

    def arrive(self) -> None:
        draw = self.draw
        prompt = PREFIXES[draw.randrange(3)][: draw.choice([0, 24, 48])]
        prompt = prompt + [500 + draw.randrange(400) for _ in range(draw.randrange(1, 12))]
        call = Call(len(self.calls), prompt, draw.randrange(1, 12))
        self.calls.append(call)
        party = self.parties[draw.choice(["r0", "r1"])]
        if party.alive:
            party.call(call)
        else:
            call.outcome = CLOSED

    def disturb(self) -> None:
        draw, world = self.draw, self.world
        kind, name = draw.choice(["router", "router", "kill", "stop", "cancel"]), draw.choice(world.names)
        party = self.parties[draw.choice(["r0", "r1"])]
        if kind == "router":
            if not party.alive:
                return
            party.kill()
            world.clock.call_in(draw.choice([0.05, 0.5]), lambda: self._begin(party.name))
        elif kind == "kill":
            world.kill(name, draw.choice([0.05, 0.5]))
        elif kind == "stop":
            world.nodes[name].stop(draw.choice([0.1, 1.0]))
        elif party.alive and party.calls:
            call = draw.choice(party.calls)
            assert call.ask is not None
            world.cancel(call.ask)
            party.dispatcher.ended(f"call-{call.number}", len(call.ask.tokens), "abort", world.clock.now())
            party._end(call, "cancelled")
        self.happened[kind] += 1

    def run(self) -> Play:
        draw, clock = self.draw, self.world.clock
        for _ in range(draw.randrange(4, 20)):
            clock.call_at(0.05 + draw.random() * 0.8, self.arrive)
        for _ in range(draw.choice([1, 2, 4])):
            clock.call_at(0.07 + draw.random() * 0.8, self.disturb)
        clock.run_until(1.0)
        while not all(call.outcome for call in self.calls):
            assert clock.now() < 60, [call for call in self.calls if not call.outcome]
            clock.run_until(clock.now() + 0.1)
        self.world.run()
        self.is_healing = True
        for node in self.world.nodes.values():
            node.scheduler.forget_cache()  # every engine tells something, so that every gap is found
        clock.run_until(clock.now() + 2.0)
        self.check()
        return self

    def check(self) -> None:
        self.world.check()
        for call in self.calls:
            assert call.outcome in ("answered", "cancelled", CLOSED, "no server is left"), call
            if call.outcome == CLOSED:
                assert self.happened["router"] or self.happened["kill"], call
            self.happened[call.outcome] += 1
        for party in self.parties.values():
            dispatcher = party.dispatcher
            assert party.alive and not party.calls and not dispatcher._calls and not dispatcher.placement._sent
            for side in (dispatcher.placement._prompts, dispatcher.placement._answers):
                assert side is None or (not side.views._sent and not side.views._reserved)
            for name, cache in dispatcher.caches.items():
                held = len(list(self.world.nodes[name].scheduler.kv.events_pool.index.keys()))
                assert cache.wanted is None and cache.num_blocks == held, (name, cache.num_blocks, held)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_either_router_may_die(part: int) -> None:
    """Every call ends as its server's answer does alone, or with one typed error; no router counts what is over."""
    happened: Counter[str] = Counter()
    for seed in range(part, NUM_SEEDS, NUM_PARTS):
        happened += Play(seed).run().happened
    for kind in ("router", "kill", "stop", "cancel", "tried again", "answered", CLOSED):
        assert happened[kind], f"no seed of this part shows {kind}"
