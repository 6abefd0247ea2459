"""The router: one engine towards its front end, many behind it. Who gets which request is a Placement's to say.

A state machine over the messages of both sides. It remembers every live request and the tokens its client has, so that
an engine may die: what it was doing goes on elsewhere, and no token comes twice. No socket, clock or process.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from penstock.cluster.decisions import NO_FORECAST, Decisions, Forecast
from penstock.cluster.merge import merged_ready, merged_report, without_gauges
from penstock.cluster.roles import PROBE, RoleKeeper
from penstock.core.kv_events import KVEvents, KVSnapshot, SnapshotRequest
from penstock.core.pool_contents import POOL
from penstock.core.request import FINISH_ERROR
from penstock.engine.messages import (
    AddRequest,
    CacheEvents,
    CacheSnapshot,
    CancelRequest,
    Drain,
    Explain,
    Failed,
    Fatal,
    FromEngine,
    Peers,
    Progress,
    Ready,
    Report,
    Stopped,
    ToEngine,
    TokenDelta,
    Tokens,
    WantSnapshot,
)

MAX_REPLAYS = 3  # times that a request may survive its engine

PREFILL, DECODE, BOTH = "prefill", "decode", "both"


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a request is decoded, and who may compute its prompt, the best first; nobody: the former. And why."""

    engine: str
    prefill_at: tuple[str, ...] = ()
    forecast: Forecast = NO_FORECAST


class Placement(Protocol):
    """Decides where requests go, from what engines say. Pure but for its own notes."""

    def joined(self, name: str, ready: Ready) -> None: ...

    def left(self, name: str) -> None: ...

    def assign(self, name: str, role: str) -> None:
        """The engine has this role from when it joins next."""
        ...

    def place(self, request: AddRequest, now: float) -> Placed | None:
        """None: there is no engine left for it."""
        ...

    def told(self, name: str, report: Report, now: float) -> None: ...

    def changed(self, events: KVEvents, now: float) -> SnapshotRequest | None:
        """An engine's cache has changed. Gives what must be asked of it, if something was missed."""
        ...

    def restored(self, snapshot: KVSnapshot, now: float) -> SnapshotRequest | None: ...

    def first_token(self, request_id: str, num_cached: int, now: float) -> None: ...

    def ended(self, request_id: str, num_output: int, now: float) -> None: ...

    def tick(self, now: float) -> list[SnapshotRequest]:
        """Some ten times a second: what is to be forgotten, and what must be asked of engines again."""
        ...


@dataclass(slots=True)
class _Live:
    request: AddRequest
    engine: str  # "" while it waits for one that is being started again
    token_ids: list[int] = field(default_factory=list)  # that the client has
    num_replays: int = 0
    cancel: CancelRequest | None = None  # that its engine was told


@dataclass(slots=True)
class Engine:
    """One engine as its router knows it."""

    name: str
    role: str
    ready: Ready | None = None
    report: Report | None = None
    is_draining: bool = False
    stopped: bool = False


Post = list[tuple[str, ToEngine]]


class Router:
    """`submit` takes the front end's messages, `receive` the engines'. Both give what goes out on either side."""

    def __init__(self, roles: dict[str, str], placement: Placement, keeper: RoleKeeper | None = None) -> None:
        self.placement = placement
        self.keeper = keeper
        self.engines = {name: Engine(name, role) for name, role in roles.items()}
        self.num_replayed = 0
        self.decisions = Decisions()
        self._live: dict[str, _Live] = {}
        self._drain: Drain | None = None
        self.is_ready = False  # all engines have been there
        self._num_asked = 0  # snapshots
        self._past: list[Report] = []  # the last words of engines that died: totals never go back

    # ---- from the front end ----

    def submit(self, message: ToEngine, now: float) -> tuple[list[FromEngine], Post]:
        """What it wants, as messages to engines; answers that need none."""
        if isinstance(message, AddRequest):
            return self._place(_Live(message, ""), now)
        if isinstance(message, CancelRequest | Explain):
            live = self._live.get(message.request_id)
            if live is not None and isinstance(message, CancelRequest):
                live.cancel = message
            if live is not None and live.engine:
                return [], [(live.engine, message)]
            if isinstance(message, CancelRequest):
                return ([self._cancelled(message, now)] if live is not None else []), []
            return [Failed(message.request_id, 404, "no such request")], []
        if isinstance(message, Drain):
            self._drain = message
            return [], self._drain_next()
        # What is of no use to an engine that starts would only wait in its wire, which then counts as not being read.
        return [], [(engine.name, message) for engine in self.engines.values() if engine.ready is not None]

    def _drain_next(self) -> Post:
        """Those that decode are drained first: until the last has stopped they need the others."""
        if self._drain is None:
            return []
        left = [engine for engine in self.engines.values() if not engine.stopped]
        decoding = [engine for engine in left if engine.role != PREFILL]
        told = [engine for engine in decoding or left if not engine.is_draining]
        for engine in told:
            engine.is_draining = True
        return [(engine.name, self._drain) for engine in told]

    def _place(self, live: _Live, now: float) -> tuple[list[FromEngine], Post]:
        request, request_id = live.request, live.request.request_id
        placed = self.placement.place(request, now)
        if placed is None and any(e.role != PREFILL and e.ready is None for e in self.engines.values()):
            live.engine = ""
            self._live[request_id] = live
            return [], []
        if placed is None:
            self._live.pop(request_id, None)
            self.decisions.ended(request_id, FINISH_ERROR)
            return [Failed(request_id, 503, "no engine is left that could decode this")], []
        live.engine = placed.engine
        self._live[request_id] = live
        self.decisions.placed(
            request_id,
            request.arrival_s,
            len(request.token_ids),
            placed.engine,
            placed.prefill_at,
            placed.forecast,
            now,
            1 + live.num_replays,
        )
        params = request.params
        if live.token_ids and params.prompt_logprobs is not None:
            params = replace(params, prompt_logprobs=None)  # the client has them
        message = msgspec.structs.replace(
            request,
            token_ids=request.token_ids + live.token_ids,
            params=params,
            num_generated=request.num_generated + len(live.token_ids),
            prefill_at=placed.prefill_at,
        )
        return [], [(placed.engine, message)]

    # ---- from the engines ----

    def receive(self, name: str, message: FromEngine, now: float) -> tuple[list[FromEngine], Post]:
        """One engine's message: what the front end is told of it, and what other engines are."""
        engine = self.engines.get(name)
        if engine is None:
            return [], []  # it was given up
        if isinstance(message, Tokens):
            return self._tokens(name, message, now), []
        if isinstance(message, Failed):
            live = self._live.get(message.request_id)
            if live is None or live.engine != name:
                return [], []
            self._end(message.request_id, FINISH_ERROR, now)
            return [message], []
        if isinstance(message, Report):
            engine.report = message
            self.placement.told(name, message, now)
            return [self._merged(message.now_s, message)], []
        if isinstance(message, Ready):
            engine.ready = message
            self.placement.joined(name, message)
            return self._joined(now)
        if isinstance(message, CacheEvents | CacheSnapshot):
            if isinstance(message, CacheEvents):
                asked = self.placement.changed(message.events, now)
            else:
                asked = self.placement.restored(message.snapshot, now)
            return [], [] if asked is None else [(name, WantSnapshot(of_pool=asked.engine == POOL))]
        if isinstance(message, Stopped):
            engine.stopped = True
            self.placement.left(name)
            return ([Stopped()] if all(each.stopped for each in self.engines.values()) else []), self._drain_next()
        if isinstance(message, Fatal):
            return self.lost(name, message.message, now)
        if isinstance(message, Progress) and self.is_ready:
            return [], []  # it is being started again
        return [message], []

    def _joined(self, now: float) -> tuple[list[FromEngine], Post]:
        """All engines learn of each other; the front end hears when the last is there."""
        ready = [engine.ready for engine in self.engines.values() if engine.ready is not None]
        peers = Peers([each.peer for each in ready if each.peer is not None])
        post: Post = [(name, peers) for name, engine in self.engines.items() if engine.ready is not None]
        if self.is_ready or len(ready) < len(self.engines):
            told: list[FromEngine] = []
            for live in [live for live in self._live.values() if not live.engine]:
                out, sent = self._place(live, now)
                told += out
                post += sent
            return told, post
        self.is_ready = True
        decoding = [e.ready for e in self.engines.values() if e.role != PREFILL and e.ready is not None]
        return [merged_ready(ready, decoding)], post

    def _tokens(self, name: str, message: Tokens, now: float) -> list[FromEngine]:
        deltas: list[TokenDelta] = []
        for delta in message.deltas:
            if self.keeper is not None and delta.request_id.startswith(PROBE):
                self.keeper.answered(delta.request_id)
                continue
            live = self._live.get(delta.request_id)
            if live is None or live.engine != name:
                continue
            if delta.token_ids and not live.token_ids:
                self.placement.first_token(delta.request_id, delta.num_cached, now)
                self.decisions.first_token(delta.request_id, now)
            live.token_ids += delta.token_ids
            if delta.finish_reason is not None:
                self._end(delta.request_id, delta.finish_reason, now)
            deltas.append(delta)
        if len(deltas) == len(message.deltas):
            return [message]
        return [msgspec.structs.replace(message, deltas=deltas)] if deltas else []

    def _cancelled(self, message: CancelRequest, now: float) -> FromEngine:
        """The last word on a request that no engine has."""
        self._end(message.request_id, message.finish_reason, now)
        return Tokens([TokenDelta(message.request_id, [], message.finish_reason, message.stop_reason)], now)

    def _end(self, request_id: str, outcome: str, now: float) -> None:
        live = self._live.pop(request_id)
        self.decisions.ended(request_id, outcome)
        self.placement.ended(request_id, len(live.token_ids), now)

    def _merged(self, now: float, newest: Report | None = None) -> Report:
        known = [(each.report, each.role) for each in self.engines.values() if each.report is not None]
        reports = [msgspec.structs.replace(report, role=role) for report, role in known]  # an engine may not know it
        return merged_report(reports, now, newest, self._past)

    # ---- roles ----

    def tick(self, now: float) -> Post:
        """Some ten times a second: what nobody's message brings about."""
        post: Post = []
        for ask in self.placement.tick(now):
            of_pool = ask.engine == POOL  # of which any engine can ask that is joined to it: one after another
            names = [e.name for e in self.engines.values() if e.ready is not None and (of_pool or e.name == ask.engine)]
            if names:
                self._num_asked += 1
                post.append((names[self._num_asked % len(names)], WantSnapshot(of_pool=of_pool)))
        if self.keeper is None or not self.is_ready:
            return post
        for moved in self.keeper.tick(self.engines, now):
            engine = self.engines[moved.engine]
            if moved.what == "leave":
                self.placement.left(engine.name)
            elif moved.probe is not None:
                post.append((engine.name, moved.probe))
            elif engine.ready is not None and engine.ready.peer is not None:
                engine.role = moved.role
                peer = msgspec.structs.replace(engine.ready.peer, role=moved.role)
                engine.ready = msgspec.structs.replace(engine.ready, peer=peer)
                self.placement.assign(engine.name, moved.role)
                self.placement.joined(engine.name, engine.ready)
                post += self._joined(now)[1]
        return post

    # ---- engines that die ----

    @property
    def serving(self) -> list[str]:
        """Engines that must go on: they are there and have not been told that they may leave."""
        return [engine.name for engine in self.engines.values() if engine.ready is not None and not engine.stopped]

    def restarting(self, name: str, now: float) -> tuple[list[FromEngine], Post]:
        """An engine is gone and will be back under its name. Without another that decodes, its requests wait for it."""
        engine = self.engines[name]
        self.engines[name] = Engine(name, engine.role)
        return self._without(engine, now)

    def lost(self, name: str, reason: str, now: float) -> tuple[list[FromEngine], Post]:
        """An engine is gone for good. Its requests go on elsewhere; without any that decodes, nothing can."""
        engine = self.engines.pop(name, None)
        if engine is None:
            return [], []
        if not self.is_ready or not any(each.role != PREFILL for each in self.engines.values()):
            return [Fatal(f"engine {name}: {reason}")], []
        return self._without(engine, now)

    def _without(self, engine: Engine, now: float) -> tuple[list[FromEngine], Post]:
        """Go on without an engine, as long as it takes."""
        name = engine.name
        self.placement.left(name)
        if self.keeper is not None:
            self.keeper.lost(name)
        if engine.report is not None:
            self._past.append(without_gauges(engine.report))
        out: list[FromEngine] = [self._merged(now)]
        peers = [e.ready.peer for e in self.engines.values() if e.ready is not None and e.ready.peer is not None]
        post: Post = [(other.name, Peers(peers)) for other in self.engines.values() if other.ready is not None]
        for request_id, live in [item for item in self._live.items() if item[1].engine == name]:
            if live.cancel is not None:
                out.append(self._cancelled(live.cancel, now))
                continue
            self.placement.ended(request_id, 0, now)
            live.num_replays += 1
            if live.num_replays > MAX_REPLAYS:
                del self._live[request_id]
                self.decisions.ended(request_id, FINISH_ERROR)
                out.append(Failed(request_id, 500, f"{live.num_replays} engines ended while they computed this"))
                continue
            self.num_replayed += 1
            told, sent = self._place(live, now)
            out += told
            post += sent
        if all(each.stopped for each in self.engines.values()):
            out.append(Stopped())
        return out, post + self._drain_next()
