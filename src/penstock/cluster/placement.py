"""Placement by predicted time: the routing policies of `core` over what live engines tell. Decides; sends nothing.

Two sets of engines: those that compute prompts and those that decode, with an index of their caches each. Where every
engine does both there is only the first. What steps cost is fitted to steps that engines have measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from penstock.cluster.decisions import Forecast
from penstock.cluster.router import DECODE, Placed
from penstock.core.cost import FittedCost, MoveCost, StepCoefficients, StepShape, fit_steps
from penstock.core.decode_policies import decode_policy
from penstock.core.kv_events import KVEvents, KVSnapshot, SnapshotRequest
from penstock.core.kv_index import KVIndex
from penstock.core.moves import DEVICE
from penstock.core.pool_contents import POOL
from penstock.core.pool_contents import TIER as REMOTE
from penstock.core.prefix import chain_start, extend_chain
from penstock.core.route_modes import Mode, ModeCosts, ModeLimits, choose_mode
from penstock.core.route_policies import prefill_policy
from penstock.core.routing import Choice, EngineReport, EngineViews, RouteRequest
from penstock.core.tiering import HOST
from penstock.engine.messages import AddRequest, Ready, Report

PRIOR = StepCoefficients(step=2e-3, token=2e-4, row=5e-5, attended=1e-8)  # until steps were measured: a small model
MIN_SAMPLES, MAX_SAMPLES = 16, 512
REFIT_S = 2.0
TAIL_S = 0.005  # of a transfer that shows, whatever the prompt's length
MAX_PREFILLS = 3  # engines that may be tried for one prompt
EXPECTED_OUTPUT = 128  # tokens, until requests have finished
ALPHA = 0.05  # weight of the newest answer's length


@dataclass(slots=True)
class _Side:
    """Engines of one kind as the policies see them."""

    index: KVIndex
    views: EngineViews


@dataclass(slots=True)
class _Sent:
    """Where a request went: rows are looked up by name, for engines come and go."""

    prefill: str = ""  # counted there until its first token
    decode: str = ""  # reserved there
    num_given: int = 0


class PolicyPlacement:
    """`prefill`, `decode`: names of policies. `split`: there are engines for one phase only. `seed`: of near-ties.

    `limits`: when a phase may stay where it does not belong.
    """

    def __init__(
        self, roles: dict[str, str], prefill: str, decode: str, limits: ModeLimits | None = None, seed: int = 0
    ) -> None:
        self.roles = dict(roles)
        self.limits = limits or ModeLimits()
        self.cost = FittedCost(PRIOR, chunk_tokens=2048)
        self._prefill = prefill_policy(prefill, self.cost, seed)
        self._decode = decode_policy(decode, self.cost, seed)
        self._prompts: _Side | None = None
        self._answers: _Side | None = None
        self._sent: dict[str, _Sent] = {}
        self._samples: deque[tuple[StepShape, float]] = deque(maxlen=MAX_SAMPLES)
        self._fitted_s = float("-inf")
        self._mean_output = float(EXPECTED_OUTPUT)
        self._identity = ("", "", 0)  # of blocks: model, format, tokens

    # ---- engines ----

    def joined(self, name: str, ready: Ready) -> None:
        """An engine is there, for the first time or again."""
        self.left(name)
        self._identity = (ready.cache_model, ready.cache_format, ready.block_size)
        side = self._side_of(name, ready)
        side.views.add(name, num_blocks=ready.num_blocks, slots=ready.max_num_seqs)

    def left(self, name: str) -> None:
        """It is gone."""
        for side in (self._prompts, self._answers):
            if side is not None and name in side.index.rows:
                side.views.remove(name)

    def assign(self, name: str, role: str) -> None:
        """It has this role from when it joins next."""
        self.roles[name] = role

    def linked(self, name: str, reads: str, serves: str) -> None:
        """Where its pool reads what others hold, and where it serves others: addresses, "" for none."""
        side = self._find(name)
        if side is not None:
            side.views.link(name, reads, serves)

    def carries(self, latency_s: float, byte_s: float) -> None:
        """How fast an engine gets what another one holds, through their pools."""
        self.cost.moves["peer"] = MoveCost(latency_s, 1 / max(byte_s, 1e-12))

    def told(self, name: str, report: Report, now: float) -> None:
        """Its own numbers."""
        side = self._find(name)
        if side is not None:
            known = frozenset(id_ for id_, sent in self._sent.items() if sent.decode == name and sent.num_given)
            free = report.kv.free + report.kv.cached
            side.views.report(name, EngineReport(report.num_running, free, known), now)
        self.learned(report.steps, now)
        for tier in report.tiers:
            if tier.name == HOST and tier.state == "on":  # of the machine, which all its engines share
                self.carries(tier.latency_s, tier.byte_s)
                self.cost.moves[REMOTE] = MoveCost(tier.latency_s, 1 / max(tier.byte_s, 1e-12))

    def learned(self, steps: Sequence[tuple[int, int, int, int, float]], now: float) -> None:
        """What steps took: tokens, rows, attended, context, seconds."""
        for *shape, seconds in steps:
            self._samples.append((StepShape(*map(int, shape)), seconds))
        if len(self._samples) >= MIN_SAMPLES and now - self._fitted_s > REFIT_S:
            self._fitted_s = now
            shapes, times = zip(*self._samples, strict=True)
            self.cost.coefficients = fit_steps(shapes, times)

    def changed(self, events: KVEvents, now: float) -> SnapshotRequest | None:
        """Its cache, or the pool that all share, has changed. Gives what must be asked if something was missed."""
        asked = [side.index.apply(events, now) for side in self._told_of(events.engine)]
        return next(filter(None, asked), None)

    def restored(self, snapshot: KVSnapshot, now: float) -> SnapshotRequest | None:
        """All that it holds, as it was asked for."""
        asked = [side.index.restore(snapshot, now) for side in self._told_of(snapshot.engine)]
        return next(filter(None, asked), None)

    def tick(self, now: float) -> list[SnapshotRequest]:
        """Promises that were not kept, engines that do not answer."""
        return [ask for side in (self._prompts, self._answers) if side is not None for ask in side.index.tick(now)]

    # ---- requests ----

    def place(self, request: AddRequest, now: float) -> Placed | None:
        """Where to send it; None when no engine is left for it."""
        asked = self._asked(request)
        prompt = self._pick_prompt(asked, now)
        if self._answers is None:
            return None if prompt is None or self._prompts is None else self._stay(asked, prompt, now, "")
        answer = self._pick_answer(asked, self._answers, now)
        mode = choose_mode(self._costs(asked, prompt, answer, now), self.limits)
        if mode is None:
            return None
        if mode.mode is Mode.PREFILL_ONLY and prompt is not None:
            return self._stay(asked, prompt, now, mode.why)
        assert answer is not None
        sent = self._sent[asked.id] = _Sent(decode=answer.engine)
        blocks = -(-(asked.prompt_tokens + asked.output_tokens) // self._answers.views.block_size)
        self._answers.views.reserve(asked.id, answer.row, blocks, now)
        if mode.mode is Mode.DECODE_ONLY or prompt is None or self._prompts is None:
            return Placed(answer.engine, (), _forecast(answer, mode.why, 1e3 * self._prefill_on_d(asked, answer)))
        sent.prefill = prompt.engine
        self._prompts.views.sent(asked.id, prompt, now)
        self._prompts.index.expect(prompt.engine, asked.hashes, now)
        others = [name for name, _ in prompt.runner_ups if name != prompt.engine]
        peers = (prompt.engine, *others)[:MAX_PREFILLS]
        return Placed(answer.engine, peers, _forecast(prompt, mode.why, prompt.predicted_ms + 1e3 * TAIL_S))

    def place_among(self, request: AddRequest, shunned: Set[str], now: float) -> Placed | None:
        """`place`, with engines that are there and shall not get this request."""
        closed = [(side.views, side.index.rows[n]) for n in shunned if (side := self._find(n)) is not None]
        for views, row in closed:
            views.alive[row] = False
        try:
            return self.place(request, now)
        finally:
            for views, row in closed:
                views.alive[row] = True

    def first_token(self, request_id: str, num_cached: int, now: float) -> None:
        """Its prompt is done."""
        sent = self._sent.get(request_id)
        if sent is not None:
            sent.num_given += 1
            if sent.prefill and self._prompts is not None:
                self._prompts.views.done(request_id, now, num_cached)
                sent.prefill = ""

    def ended(self, request_id: str, num_output: int, now: float) -> None:
        """It is over; or its engine is, and it will be placed again."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return
        if num_output:
            self._mean_output += ALPHA * (num_output - self._mean_output)
        if sent.prefill and self._prompts is not None:
            self._prompts.views.done(request_id, now)
        if sent.decode and self._answers is not None:
            self._answers.views.release(request_id)

    # ---- inside ----

    def _asked(self, request: AddRequest) -> RouteRequest:
        """What policies must know of a request: its blocks' hashes, as its engines compute them."""
        model, format_, block_size = self._identity
        hashes: list[bytes] = []
        if block_size:
            start = chain_start(model, format_, block_size, request.adapter, request.salt)
            extend_chain(hashes, start, request.token_ids[:-1], block_size)
        most = request.params.max_tokens
        num_output = int(self._mean_output) if most is None else min(most, max(16, int(1.5 * self._mean_output)))
        return RouteRequest(request.request_id, len(request.token_ids), hashes, num_output)

    def _pick_prompt(self, asked: RouteRequest, now: float) -> Choice | None:
        side = self._prompts
        return None if side is None else self._prefill.pick(asked, side.views, side.index, now)

    def _pick_answer(self, asked: RouteRequest, side: _Side, now: float) -> Choice | None:
        """By the policy; where all are full, the one with the fewest: it waits there rather than where it must not."""
        choice = self._decode.pick(asked, side.views, side.index, now)
        if choice is None and side.views.alive.any():
            row = int(np.where(side.views.alive, side.views.num_running, np.iinfo(np.int64).max).argmin())
            choice = Choice(side.views.names[row], row, 0.0, {}, (), 0, 0, 0.0)
        if choice is None:
            return None
        hit = int(side.index.match(asked.hashes).blocks[DEVICE][choice.row]) * side.views.block_size
        return replace(choice, hit_tokens=hit, new_tokens=asked.prompt_tokens - hit)

    def _stay(self, asked: RouteRequest, prompt: Choice, now: float, why: str) -> Placed:
        """Prompt and answer at one engine."""
        assert self._prompts is not None
        self._sent[asked.id] = _Sent(prefill=prompt.engine)
        self._prompts.views.sent(asked.id, prompt, now)
        self._prompts.index.expect(prompt.engine, asked.hashes, now)
        return Placed(prompt.engine, (), _forecast(prompt, why, prompt.predicted_ms))

    def _prefill_on_d(self, asked: RouteRequest, answer: Choice) -> float:
        return self.cost.prefill_seconds(answer.new_tokens, asked.prompt_tokens - answer.new_tokens)

    def _costs(self, asked: RouteRequest, prompt: Choice | None, answer: Choice | None, now: float) -> ModeCosts:
        """What each way of serving a request would cost."""
        step_s = self.cost.step_seconds(StepShape(1, 1, asked.prompt_tokens, asked.prompt_tokens))
        new_d = asked.prompt_tokens if answer is None else answer.new_tokens
        prefill_d_s = 0.0 if answer is None else self._prefill_on_d(asked, answer)
        running_d = p_load = d_load = queue_p_s = 0.0
        if answer is not None and self._answers is not None:
            views = self._answers.views
            running_d = float(views.num_running[answer.row])
            d_load = running_d / max(1.0, float(views.slots[answer.row]))
        if prompt is not None and self._prompts is not None:
            queue_p_s = float(self._prompts.views.wait_s(now)[prompt.row])
            p_load = min(1.0, queue_p_s / self.limits.ttft_slo_s)
        return ModeCosts(
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            queue_p_s=queue_p_s,
            prefill_p_s=0.0 if prompt is None else prompt.prefill_s,
            tail_s=TAIL_S,
            queue_d_s=0.0,
            new_tokens_d=new_d,
            prefill_d_s=prefill_d_s,
            harm_d_s=prefill_d_s * running_d,
            step_p_s=step_s + (0.0 if prompt is None else p_load * prompt.prefill_s),
            step_d_s=step_s,
            harm_p_s=asked.output_tokens * step_s * p_load,
            p_load=p_load,
            d_load=d_load,
            has_p=prompt is not None,
            has_d=answer is not None,
        )

    def _side_of(self, name: str, ready: Ready) -> _Side:
        if self.roles[name] == DECODE:
            self._answers = self._answers or _new_side(ready)
            return self._answers
        self._prompts = self._prompts or _new_side(ready)
        return self._prompts

    def _told_of(self, name: str) -> list[_Side]:
        """Who must know what this engine holds; all must of the pool."""
        if name != POOL:
            side = self._find(name)
            return [] if side is None else [side]
        sides = [side for side in (self._prompts, self._answers) if side is not None]
        for side in sides:
            if POOL not in side.index.rows:
                side.views.add_pool(POOL)
        return sides

    def _find(self, name: str) -> _Side | None:
        for side in (self._prompts, self._answers):
            if side is not None and name in side.index.rows:
                return side
        return None


def _new_side(ready: Ready) -> _Side:
    index = KVIndex(max(1024, 4 * ready.num_blocks))
    return _Side(index, EngineViews(index, ready.block_size, ready.block_bytes))


def _forecast(choice: Choice, why: str, ttft_ms: float) -> Forecast:
    return Forecast(why, ttft_ms / 1e3, choice.terms, choice.runner_ups, choice.hit_tokens, choice.new_tokens)
