"""The router: one engine towards its front end, many behind it. Who gets which request is a Placement's to say.

A state machine over the messages of both sides. It remembers every live request and the tokens its client has, so that
an engine may die: what it was doing goes on elsewhere, and no token comes twice. No socket, clock or process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from penstock.cluster.decisions import NO_FORECAST, Decisions, Forecast
from penstock.cluster.merge import merged_ready, merged_report, without_gauges
from penstock.core.kv_events import KVEvents, KVSnapshot, SnapshotRequest
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
    stopped: bool = False


Post = list[tuple[str, ToEngine]]


class Router:
    """`submit` takes the front end's messages, `receive` the engines'. Both give what goes out on either side."""

    def __init__(self, roles: dict[str, str], placement: Placement) -> None:
        self.placement = placement
        self.engines = {name: Engine(name, role) for name, role in roles.items()}
        self.num_replayed = 0
        self.decisions = Decisions()
        self._live: dict[str, _Live] = {}
        self.is_ready = False  # all engines have been there
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
        # What is of no use to an engine that starts would only wait in its wire, which then counts as not being read.
        ready = [engine.name for engine in self.engines.values() if engine.ready is not None]
        return [], [(name, message) for name in (self.engines if isinstance(message, Drain) else ready)]

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
            return [], [] if asked is None else [(asked.engine, WantSnapshot())]
        if isinstance(message, Stopped):
            engine.stopped = True
            return ([Stopped()] if all(each.stopped for each in self.engines.values()) else []), []
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
        reports = [each.report for each in self.engines.values() if each.report is not None]
        return merged_report(reports, now, newest, self._past)

    def tick(self, now: float) -> Post:
        """Some ten times a second: what engines are asked again."""
        ready = [asked.engine for asked in self.placement.tick(now) if self.engines[asked.engine].ready is not None]
        return [(name, WantSnapshot()) for name in ready]

    # ---- engines that die ----

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
        return out, post


class LeastLoaded:
    """Requests go to the engine with the fewest tokens to do; every prompt may be computed by any prefill engine.

    `roles`: of all engines by name. Prompts of up to `min_tokens` tokens are computed where they are decoded.
    """

    def __init__(self, roles: dict[str, str], min_tokens: int = 256) -> None:
        self._roles = dict(roles)
        self._min_tokens = min_tokens
        self._alive: set[str] = set()
        self._load = dict.fromkeys(roles, 0)
        self._charged: dict[str, list[tuple[str, int]]] = {}  # request -> (engine, tokens) still to do

    def joined(self, name: str, ready: Ready) -> None:
        self._alive.add(name)

    def left(self, name: str) -> None:
        self._alive.discard(name)

    def place(self, request: AddRequest, now: float) -> Placed | None:
        decoding = self._least(name for name in self._alive if self._roles[name] != PREFILL)
        if not decoding:
            return None
        loads = {name: float(self._load[name]) for name in self._alive}
        engine, num_prompt = decoding[0], len(request.token_ids)
        num_output = request.params.max_tokens or num_prompt
        peers = self._least(n for n in self._alive if self._roles[n] != DECODE and n != engine)
        if num_prompt < self._min_tokens:
            peers = []
        self._charge(request.request_id, [(engine, num_output), (peers[0] if peers else engine, num_prompt)])
        terms = {name: loads[name] for name in (*peers[:1], engine)}
        reason = "fewest tokens to do" if peers or num_prompt >= self._min_tokens else "a short prompt stays"
        runner_ups = tuple((name, loads[name]) for name in decoding[1:3])
        return Placed(engine, tuple(peers), Forecast(reason, None, terms, runner_ups))

    def told(self, name: str, report: Report, now: float) -> None:
        """Its own count is enough."""

    def changed(self, events: KVEvents, now: float) -> SnapshotRequest | None:
        """Caches do not count."""
        return None

    def restored(self, snapshot: KVSnapshot, now: float) -> SnapshotRequest | None:
        return None

    def first_token(self, request_id: str, num_cached: int, now: float) -> None:
        """The prompt is done."""
        charges = self._charged.get(request_id, [])
        if len(charges) == 2:
            name, num_tokens = charges.pop()
            self._load[name] -= num_tokens

    def ended(self, request_id: str, num_output: int, now: float) -> None:
        for name, num_tokens in self._charged.pop(request_id, ()):
            self._load[name] -= num_tokens

    def tick(self, now: float) -> list[SnapshotRequest]:
        return []

    def _charge(self, request_id: str, charges: Sequence[tuple[str, int]]) -> None:
        self._charged[request_id] = list(charges)
        for name, num_tokens in charges:
            self._load[name] += num_tokens

    def _least(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (self._load[name], name))
