"""One engine: scheduler, executor, and what it tells its front end. A state machine over messages and steps.

`handle(message, now)`, `launch(now)` and `complete(result, now)` give messages back. No asyncio, no socket, no clock:
the live loop and the simulators drive the same object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.cost import StepShape
from penstock.core.doors import Executor, Mover
from penstock.core.moves import KVMove, KVTicket, MoveResult
from penstock.core.plan import Logprobs, StepResult
from penstock.core.request import FINISH_ABORT, FINISH_ERROR, Request
from penstock.core.scheduler import Scheduler
from penstock.core.steps import Progress
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    Drain,
    Explain,
    Failed,
    FromEngine,
    Record,
    ResetPrefixCache,
    Stopped,
    ToEngine,
    TokenDelta,
    Tokens,
    Watch,
)
from penstock.engine.report import Reporter
from penstock.engine.tier_source import TierSource
from penstock.engine.timeline import Timeline

MEASURE_EVERY = 4  # steps: what they cost changes slowly


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a request may ask of this engine."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]


class MoveWatcher(Protocol):
    """Sees every move of an engine begin and end."""

    def started(self, move: KVMove, now: float) -> None: ...

    def ended(self, move: KVMove, result: MoveResult, now: float) -> None: ...


class Engine:
    """Owns its scheduler and submits to its executor; the driver collects. One thread calls it.

    `mover` carries KV that comes from elsewhere or goes elsewhere; None: there is no elsewhere.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        limits: EngineLimits,
        mover: Mover | None = None,
        watcher: MoveWatcher | None = None,
        tiers: TierSource | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.mover = mover
        self.watcher = watcher
        self.tiers = tiers
        self.limits = limits
        self.timeline = Timeline(scheduler)
        scheduler.trace = self.timeline.event
        self.reporter = Reporter(scheduler, self.timeline)
        if tiers is not None:
            self.reporter.tiers = tiers.reports
        self._deadlines: dict[str, float] = {}
        self._submitted_s: dict[int, float] = {}  # step -> when
        self._shapes: dict[int, StepShape] = {}  # of steps that are measured
        self._drain_until: float | None = None
        self._stopped = False
        self._prompt_logprobs: dict[str, list[Logprobs | None]] = {}

    # ---- messages ----

    def handle(self, message: ToEngine, now: float) -> list[FromEngine]:
        """Take one message in; what it answers at once."""
        if isinstance(message, AddRequest):
            return self.add(message, now)
        if isinstance(message, CancelRequest):
            request = self._finish(message.request_id, message.finish_reason, now)
            return [] if request is None else [self._ended(request, message.stop_reason, now)]
        if isinstance(message, Watch):
            self.reporter.watch(message)
        elif isinstance(message, ResetPrefixCache):
            self.scheduler.forget_cache()
        elif isinstance(message, Drain):
            self._drain_until = message.until_s
        elif isinstance(message, Explain):
            found = self.scheduler.requests.get(message.request_id)
            if found is None:
                return [Failed(message.request_id, 404, "no such request")]
            return [Record(self.timeline.record(found))]
        return []

    def add(self, message: AddRequest, now: float, ticket: KVTicket | None = None) -> list[FromEngine]:
        """Queue a request, or refuse it. `ticket`: its prompt is computed for another engine."""
        error = self._refusal(message)
        if error is not None:
            return [Failed(message.request_id, *error)]
        params, prompt_len = message.params, len(message.token_ids) - message.num_generated
        limit = min(self.limits.max_model_len, self.scheduler.kv.max_request_tokens())
        eos: frozenset[int] = frozenset() if params.ignore_eos else self.limits.eos_token_ids.union(message.end_ids)
        request = Request(
            id=message.request_id,
            token_ids=list(message.token_ids),
            prompt_len=prompt_len,
            params=params,
            seed=message.seed,
            max_total=limit if params.max_tokens is None else min(limit, prompt_len + params.max_tokens),
            stop_ids=eos.union(params.stop_token_ids),
            arrival_s=message.arrival_s,
            deadline_s=message.deadline_s,
            priority=message.priority,
            adapter=message.adapter,
            salt=message.salt,
            ticket=ticket,
        )
        self.timeline.queued(request, now)
        self.scheduler.add(request)
        if self.tiers is not None:
            self.tiers.arrived(request, now)
        if message.deadline_s is not None:
            self._deadlines[request.id] = message.deadline_s
        return []

    def _refusal(self, message: AddRequest) -> tuple[int, str] | None:
        """(HTTP-like code, why) if the request cannot be taken."""
        num_tokens = len(message.token_ids)
        prompt_len = num_tokens - message.num_generated
        limit = min(self.limits.max_model_len, self.scheduler.kv.max_request_tokens())
        if self._drain_until is not None:
            return 503, "the server is shutting down"
        if message.request_id in self.scheduler.requests:
            return 400, f"request id {message.request_id!r} is in use"
        if prompt_len <= 0:
            return 400, "the prompt is empty"
        if num_tokens >= limit:
            return 400, f"the prompt has {num_tokens} tokens; at most {limit - 1} fit (model length {limit})"
        if min(message.token_ids) < 0 or max(message.token_ids) >= self.limits.vocab_size:
            return 400, f"the prompt holds token ids outside the vocabulary of {self.limits.vocab_size}"
        return None

    def _finish(self, request_id: str, reason: str, now: float) -> Request | None:
        self._deadlines.pop(request_id, None)
        return self.scheduler.finish(request_id, reason, now)

    # ---- steps ----

    @property
    def has_work(self) -> bool:
        """Are there requests, steps whose results are out, or moves on their way?"""
        return self.scheduler.has_work or self.has_moves

    @property
    def has_moves(self) -> bool:
        """Are moves on their way, so that `launch` must look for their ends?"""
        return bool(self.scheduler.traffic.flights) or (self.tiers is not None and self.tiers.is_busy)

    @property
    def stopped(self) -> bool:
        """Drained: nothing more will come."""
        return self._stopped

    def launch(self, now: float) -> list[FromEngine]:
        """End what is over time, then plan and submit as far ahead as the executor is deep."""
        out: list[FromEngine] = []
        if self.mover is not None:
            self._end_moves(self.mover, now)
        if self.tiers is not None:
            self.tiers.turn(now)
        if self._deadlines:
            self._expire(now, out)
        if self._drain_until is not None and not self._stopped:
            self._drain(now, out)
        while self.scheduler.num_submitted < self.executor.depth and self.scheduler.requests:
            plan = self.scheduler.plan(now)
            if plan is None:
                break
            self._submitted_s[plan.step] = now
            if self.reporter.tells_steps and plan.step % MEASURE_EVERY == 0:
                self._shapes[plan.step] = StepShape.of(plan)
            if plan.awaits and self.mover is not None:
                self._start_moves(self.mover, now)  # before somebody waits for them
            self.executor.submit(plan)
        if self.mover is not None:
            self._start_moves(self.mover, now)
        report = self.reporter.due(now)
        if report is not None:
            out.append(report)
        return out

    def _end_moves(self, mover: Mover, now: float) -> None:
        for result in mover.poll():
            flight = self.scheduler.traffic.flights.get(result.id)
            self.scheduler.moved(result, now)
            if self.tiers is not None:
                self.tiers.ended_move(result)
            if flight is not None and self.watcher is not None:
                self.watcher.ended(flight.move, result, now)

    def _start_moves(self, mover: Mover, now: float) -> None:
        traffic = self.scheduler.traffic
        moves, traffic.started = traffic.started, []
        cancelled, traffic.cancelled = traffic.cancelled, []
        for move in moves:
            mover.start(move)
            if self.tiers is not None:
                self.tiers.started(move)
            if self.watcher is not None:
                self.watcher.started(move, now)
        for move_id in cancelled:
            mover.cancel(move_id)

    def complete(self, result: StepResult, now: float) -> list[FromEngine]:
        """Take the oldest submitted step's result in; `now` is when it came."""
        chunks = self.scheduler.oldest_chunks
        progress = self.scheduler.commit(result, now)
        start = self._submitted_s.pop(result.step)
        shape = self._shapes.pop(result.step, None)
        if shape is not None:
            self.reporter.measured(shape, result.seconds)
        if chunks:
            self.timeline.computed(chunks, max(start, now - result.seconds), now)
        self.reporter.stepped(len(result.tokens), chunks, result.seconds)
        if self.tiers is not None:
            self.tiers.stepped(len(result.tokens), chunks, result.seconds)
        return self.deliver(progress, now)

    def deliver(self, progress: Sequence[Progress], now: float) -> list[FromEngine]:
        """What requests were given, as messages."""
        out: list[FromEngine] = []
        deltas: list[TokenDelta] = []
        for item in progress:
            self._deliver(item, deltas, out)
        if deltas:
            out.append(Tokens(deltas, now))
        return out

    def drop(self, request_id: str, now: float) -> None:
        """End a request of which nobody is told."""
        if self._finish(request_id, FINISH_ABORT, now) is not None:
            self._forget(request_id)

    def _deliver(self, item: Progress, deltas: list[TokenDelta], out: list[FromEngine]) -> None:
        """One request's share of a step, as it goes to the front end."""
        request = item.request
        if item.error is not None:
            self._forget(request.id)
            out.append(Failed(request.id, 500, item.error))
            return
        prompt_logprobs = None
        if request.params.prompt_logprobs is not None:
            owed = self._prompt_logprobs.setdefault(request.id, [None])
            owed += item.prompt_logprobs or []
            if not item.token_ids:
                return
            if request.num_output == len(item.token_ids):
                prompt_logprobs = owed
        if request.finish_reason is None:
            deltas.append(
                TokenDelta(
                    request.id,
                    item.token_ids,
                    logprobs=item.logprobs,
                    prompt_logprobs=prompt_logprobs,
                    num_cached=request.num_cached,
                )
            )
            return
        deltas.append(
            TokenDelta(
                request.id,
                item.token_ids,
                request.finish_reason,
                request.stop_reason,
                item.logprobs,
                prompt_logprobs,
                request.num_cached,
                self.timeline.record(request),
            )
        )
        self._forget(request.id)

    def _ended(self, request: Request, stop_reason: str | None, now: float) -> FromEngine:
        """The last word on a request that was ended from outside."""
        request.stop_reason = stop_reason
        record = self.timeline.record(request)
        self._forget(request.id)
        delta = TokenDelta(
            request.id, [], request.finish_reason, stop_reason, num_cached=request.num_cached, record=record
        )
        return Tokens([delta], now)

    def _forget(self, request_id: str) -> None:
        if self.tiers is not None:
            self.tiers.ended(request_id)
        self.timeline.drop(request_id)
        self._deadlines.pop(request_id, None)
        self._prompt_logprobs.pop(request_id, None)

    def _expire(self, now: float, out: list[FromEngine]) -> None:
        for request_id in [i for i, deadline in self._deadlines.items() if deadline <= now]:
            request = self._finish(request_id, FINISH_ERROR, now)
            if request is not None:
                self._forget(request_id)
                waited = now - request.arrival_s
                out.append(Failed(request_id, 504, f"the request did not finish within its {waited:.1f} s"))

    def _drain(self, now: float, out: list[FromEngine]) -> None:
        assert self._drain_until is not None
        if now >= self._drain_until:
            for request_id in list(self.scheduler.requests):
                request = self._finish(request_id, FINISH_ABORT, now)
                if request is not None:
                    out.append(self._ended(request, None, now))
        if not self.has_work:
            self._stopped = True
            out.append(Stopped())
