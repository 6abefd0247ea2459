"""The scheduler of one engine: which tokens the next step computes. Bookkeeping only: no tensor, clock, device or I/O.

There is no prefill mode and no decode mode: each request has a gap of tokens that are not computed yet, and a step
closes it as far as the token budget and free blocks allow. Plans may be made ahead of results (`Executor.depth`), for a
plan never needs token values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from penstock.config.model import KVLayout
from penstock.core.admission import PeakPredictor
from penstock.core.doors import DraftAllocator, KVSource, SchedulePolicy
from penstock.core.kv_cache import BlockIds, KVCache
from penstock.core.moves import MoveResult
from penstock.core.plan import Admitted, Row, StepPlan, StepResult
from penstock.core.preemption import victims_for
from penstock.core.prefix import Hit
from penstock.core.request import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, Request
from penstock.core.steps import Counters, Given, Progress, SchedulerLimits, Submitted
from penstock.core.traffic import Flight, Offer, Traffic

LOOK_AHEAD = 64  # waiting requests that are passed over before a plan gives up admitting
MIN_CHUNK = 16  # a prompt is not started for fewer tokens (a quarter of a small step), unless it ends with them
WAITS = frozenset(("capacity", "shared_block", "preempted"))  # reasons of waiting that are not gates


class Scheduler:
    """`add`/`finish`/`arrive`/`fail` change what there is to do; `plan` -> submit -> collect -> `commit` does it.

    `source`: where else than from steps the KV of a prompt's beginning may come. `traffic` tells what is to be moved;
    how a move ended is told to `moved`. `trace(kind, request, now)` is told of admissions, preemptions and receipts.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: tuple[int, ...],
        limits: SchedulerLimits,
        policy: SchedulePolicy,
        *,
        model_id: str = "",
        prefix_caching: bool = True,
        feeds_back: bool = True,
        drafts: DraftAllocator | None = None,
        source: KVSource | None = None,
        trace: Callable[[str, Request, float], None] | None = None,
    ) -> None:
        self.layout = layout
        self.limits = limits
        self.policy = policy
        self.feeds_back = feeds_back
        self.drafts = drafts
        self.source = source
        self.trace = trace or (lambda kind, request, now: None)
        self.block_size = layout.block_size
        self.kv = KVCache(layout, num_blocks, model_id, prefix_caching, limits.max_num_batched_tokens)
        self.pools = self.kv.pools
        self.traffic = Traffic(self.kv)
        self.peak = PeakPredictor(self.block_size, [n - 1 for n in num_blocks], self.kv.max_held)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counters = Counters()
        self.step = 0
        self._submitted: deque[Submitted] = deque()
        self._released: list[str] = []
        self._num_returns = 0  # times that memory or the outlook on it may have grown
        self._gave_way: set[str] = set()  # preempted by the plan that is being made
        self._waiting_sorted = True

    # ---- what there is to do ----

    def add(self, request: Request) -> None:
        """Queue a request. Its id must be new; `request.max_total` must be within `kv.max_request_tokens`."""
        assert request.id not in self.requests and len(request.token_ids) < request.max_total
        assert request.max_total <= self.kv.max_request_tokens()
        self.kv.reset(request)
        self.requests[request.id] = request
        self.waiting.append(request)
        self._waiting_sorted = False

    def finish(self, request_id: str, reason: str, now: float) -> Request | None:
        """End a request at once, whatever it is doing; None if it is not there. Its blocks go when steps allow."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, reason, now)
        return request

    def hold_at(self, request_id: str, gate: str, position: int) -> None:
        """The request may compute up to `position` until `gate` arrives or fails."""
        self.requests[request_id].waiting_for[gate] = position

    def arrive(self, gate: str) -> None:
        """What was waited for is there."""
        for request in self.requests.values():
            request.waiting_for.pop(gate, None)

    def fail(self, gate: str, now: float) -> list[Request]:
        """What was waited for will never come: the requests that needed it end with an error."""
        failed = [r for r in self.requests.values() if gate in r.waiting_for]
        for request in failed:
            self._finish(request, FINISH_ERROR, now)
        return failed

    def give(self, request_id: str, position: int, given: Given, now: float) -> Progress | None:
        """Tokens at `position` that another engine computed; None if the request is gone or is elsewhere by now."""
        request = self.requests.get(request_id)
        if request is None or len(request.token_ids) != position or request.num_in_flight:
            return None
        tokens = request.append(given.token_ids, now)
        self.counters.generation_tokens += len(tokens)
        if given.prompt_logprobs is not None:
            request.num_logprobs_done = request.prompt_len - 1
        if request.finish_reason is not None:
            self._finish(request, request.finish_reason, now)
        return Progress(request, tokens, given.logprobs, given.prompt_logprobs)

    def moved(self, result: MoveResult, now: float) -> None:
        """A move has ended. What came is in place; what did not come is computed, or asked for elsewhere."""
        flight = self.traffic.end(result)
        self._num_returns += 1
        if flight is None:
            return
        assert flight.request is not None
        if result.error is None:
            self._received(flight.request, flight, now)
        else:
            self._requeue(flight.request)
            self.trace("preempted", flight.request, now)

    def _received(self, request: Request, flight: Flight, now: float) -> None:
        self.kv.receive(request, flight.end, self._fence())
        self.counters.received(request, flight.end - flight.start, flight.is_cache)
        self.trace("received", request, now)

    def forget_cache(self) -> None:
        """Drop every cached block; blocks of live requests stay, unpublished."""
        self.kv.forget()
        self._num_returns += 1

    @property
    def has_work(self) -> bool:
        return bool(self.requests) or bool(self._submitted)

    @property
    def num_submitted(self) -> int:
        """Steps planned and not committed."""
        return len(self._submitted)

    @property
    def oldest_chunks(self) -> list[tuple[Request, Row]]:
        """Of the step that is committed next: the rows that compute more than a request's newest token."""
        return self._submitted[0].chunks

    # ---- plan ----

    def plan(self, now: float) -> StepPlan | None:
        """Choose the next step's tokens, and count it as submitted. None when nothing can be computed now."""
        budget = self.limits.max_num_batched_tokens
        self._gave_way.clear()
        submitted = Submitted(StepPlan(self.step, []), [])
        decodes: list[Request] = []
        chunks: list[Request] = []
        for request in self.running:
            pending = len(request.token_ids) + request.num_unsampled - request.num_computed - request.num_planned
            if pending == 1:
                decodes.append(request)
            elif pending:
                chunks.append(request)
        num_left = len(decodes)  # each gets a token before drafts or a long prompt get any
        for request in decodes:
            if budget and request.is_running:  # an earlier row of this plan may have taken its blocks
                budget -= self._plan_running(request, 1, budget - num_left, submitted, now)
            num_left -= 1
        for request in chunks:
            if budget and request.is_running:
                num_tokens = min(request.num_pending, budget)
                budget -= self._plan_running(request, num_tokens, budget - num_tokens, submitted, now)
        if self.waiting and budget:
            self._admit(budget, submitted, now)
        plan = submitted.plan
        if not plan.rows:
            return None
        plan.released, self._released = tuple(self._released), []
        self._submitted.append(submitted)
        self.step += 1
        return plan

    def _plan_running(self, request: Request, num_tokens: int, spare: int, submitted: Submitted, now: float) -> int:
        """Give a running request a row of up to `num_tokens` and `spare` drafts, if it can have one; tokens taken."""
        num_known = len(request.token_ids) + request.num_unsampled
        if request.num_unsampled and (not self.feeds_back or num_known >= request.max_total):
            return 0  # its last token is being sampled already
        start = request.num_computed + request.num_planned
        if request.waiting_for:
            num_tokens = min(num_tokens, self._gate(request) - start)
            if num_tokens <= 0:
                return 0
        num_draft = 0
        if self.drafts is not None and spare > 0 and start + num_tokens == num_known:
            num_draft = max(0, min(self.drafts.num_draft(request), request.max_total - num_known - 1, spare))
        new_blocks = self.kv.nothing
        missing = start + num_tokens + num_draft - len(request.block_tables[0]) * self.block_size
        if num_draft and missing > 0 and any(-(-missing // self.block_size) > p.num_available for p in self.pools):
            dropped = min(num_draft, missing)  # guesses take nobody's blocks
            num_draft, missing = num_draft - dropped, missing - dropped
        if missing > 0:
            reserved = self._reserve(request, start + num_tokens + num_draft, now)
            if reserved is None:
                return 0
            new_blocks = reserved
        self._add_row(request, start, num_tokens, num_draft, new_blocks, submitted)
        return num_tokens + num_draft

    def _add_row(
        self,
        request: Request,
        start: int,
        num_tokens: int,
        num_draft: int,
        new_blocks: BlockIds,
        submitted: Submitted,
    ) -> None:
        plan, size, end, total = submitted.plan, self.block_size, start + num_tokens, num_tokens + num_draft
        samples = end == len(request.token_ids) + request.num_unsampled
        num_logits = 1 + num_draft if samples else 0
        if start < request.prompt_len - 1 and request.params.prompt_logprobs is not None:
            if end > request.num_logprobs_done:
                num_logits = total
        if not request.is_on_rank:
            request.is_on_rank = True
            new_blocks = tuple(map(tuple, request.block_tables))
            plan.admitted += (Admitted.of(request),)
        row = Row(request.id, start, total, num_draft, num_logits, samples, new_blocks)
        plan.rows.append(row)
        if request.arriving >= 0:
            submitted.loads[len(submitted.rows)] = request.arriving
            plan.awaits += (request.arriving,)
        submitted.rows.append((request, request.epoch))
        if start < request.prompt_len or num_tokens > 1:
            submitted.chunks.append((request, row))
        request.plan_marker = self.step
        request.num_planned += total
        request.num_in_flight += 1
        if samples:
            request.num_unsampled += 1 + num_draft
        if end // size > start // size:
            submitted.filling += self.kv.begin_filling(request, start, end)
        if request.ticket is not None:
            self.traffic.send(request, end, self.step)

    def _reserve(self, request: Request, end: int, now: float) -> BlockIds | None:
        """Blocks for tokens up to `end`; preempts others if it must. None: not this step."""
        num_blocks = -(-end // self.block_size)
        needs = [num_blocks - len(table) for table in request.block_tables]
        if any(need > pool.num_available for need, pool in zip(needs, self.pools, strict=True)):
            victims = victims_for(request, needs, self.running, self.step, self.kv, self.policy, now)
            for victim in victims or ():
                self._preempt(victim, now)
            if victims is None or any(n > pool.num_available for n, pool in zip(needs, self.pools, strict=True)):
                return None
        return self.kv.allocate(request, needs, now)

    # ---- admission ----

    def _admit(self, budget: int, submitted: Submitted, now: float) -> None:
        """Start waiting requests while budget, rows and predicted memory last."""
        rows = submitted.plan.rows
        if self.policy.ages or not self._waiting_sorted:
            self.waiting = self.policy.order(self.waiting, now)
            self._waiting_sorted = True
        if len(self.running) >= self.limits.max_num_seqs:
            self._wait_for_slots()
            return
        started: set[str] = set()
        num_passed, looked = 0, False
        for request in self.waiting:
            if len(self.running) >= self.limits.max_num_seqs or num_passed >= LOOK_AHEAD:
                break
            reason: str | None = "capacity"
            if request.refused_at != self._num_returns:  # something came back since it did not fit
                if not looked:
                    running = [(other, self.kv.count_shared(other)) for other in self.running]
                    self.peak.begin(running, self.kv.num_shared)
                    looked = True
                num_rows = len(rows)
                reason = self._try_admit(request, budget, submitted, now)
                if reason == "capacity":
                    request.refused_at = self._num_returns
            if reason is None:
                started.add(request.id)
                if len(rows) > num_rows:
                    budget -= rows[-1].num_tokens
                continue
            request.queue_reason = reason
            if reason == "budget":
                break
            if reason not in WAITS:
                continue  # its gate is shut: that says nothing about those behind it
            num_passed += 1
            if request.passed_over_s is None:
                if reason == "capacity":
                    request.passed_over_s = now
            elif now - request.passed_over_s > self.limits.max_queue_wait_s:
                break  # it has waited long enough: nobody overtakes it any more
        if started:
            self.waiting = [r for r in self.waiting if r.id not in started]
            self.running = self.policy.order(self.running, now)
            if len(self.running) >= self.limits.max_num_seqs:
                self._wait_for_slots()

    def _wait_for_slots(self) -> None:
        for request in self.waiting[:LOOK_AHEAD]:
            request.queue_reason = request.queue_reason or "slots"

    def _try_admit(self, request: Request, budget: int, submitted: Submitted, now: float) -> str | None:
        """Start one waiting request, or say why not."""
        if request.num_in_flight or request.id in self._gave_way:
            return "preempted"  # its last rows must come home first; and not in the plan that took its blocks
        size = self.block_size
        hit = self.kv.match(request)
        start = hit.num_blocks * size
        if self.kv.is_being_computed(request, hit):
            return "shared_block"
        offer = None if self.source is None else self.source.offer(request, hit.num_blocks, now)
        if isinstance(offer, str):
            return offer
        if offer is not None and offer.num_tokens > start:
            return self._try_receive(request, hit, offer, budget, submitted, now)
        limit = len(request.token_ids)
        if request.waiting_for:
            limit = min(limit, self._gate(request))
            if limit <= start:
                return next(iter(request.waiting_for)).split(":")[0]
        num_tokens = min(limit - start, budget)
        if num_tokens < min(limit - start, MIN_CHUNK, 1 + self.limits.max_num_batched_tokens // 4):
            return "budget"
        sharing = self.kv.sharing(hit, self.running)
        if not self.peak.fits(request, sharing):
            return "capacity"
        need = -(-(start + num_tokens) // size) - hit.num_blocks
        if not self.kv.has_room(need, hit):
            return "capacity"
        self.peak.add(request, sharing)
        self._start(request, hit, now)
        self.kv.allocate(request, [need] * len(self.pools), now)
        self._add_row(request, start, num_tokens, 0, self.kv.nothing, submitted)
        return None

    def _try_receive(
        self, request: Request, hit: Hit, offer: Offer, budget: int, submitted: Submitted, now: float
    ) -> str | None:
        """Start a waiting request on KV that comes from elsewhere, or say why not.

        Behind blocks of a tier it computes at once: the step waits for them layer by layer. A peer's take longer.
        """
        end = offer.num_tokens
        if offer.is_cache and request.ticket is None and not request.waiting_for:
            end += min(len(request.token_ids) - end, budget)
        sharing = self.kv.sharing(hit, self.running)
        if not self.peak.fits(request, sharing) or not self.kv.has_room_to_receive(hit, offer.num_tokens, end):
            return "capacity"
        self.peak.add(request, sharing)
        self._start(request, hit, now)
        self.kv.reserve(request, offer.num_tokens, end, now)
        self.traffic.receive(request, offer, shut=end == offer.num_tokens)
        self.trace("receiving", request, now)
        if end > offer.num_tokens:
            request.num_computed = offer.num_tokens
            self._add_row(request, offer.num_tokens, end - offer.num_tokens, 0, self.kv.nothing, submitted)
        return None

    def _start(self, request: Request, hit: Hit, now: float) -> None:
        self.kv.hold(request, hit)
        request.passed_over_s = None
        if request.admitted_s is None:
            request.admitted_s = now
            request.num_cached = request.num_computed
            self.counters.admitted(request, self.kv.enabled)
        self.running.append(request)
        request.is_running = True
        if request.ticket is not None:
            self.traffic.send(request, request.num_computed, -1)
        self.trace("admitted", request, now)

    # ---- commit ----

    def commit(self, result: StepResult, now: float) -> list[Progress]:
        """Take a step's result in: tokens, finished requests, published blocks. Steps are committed in order."""
        submitted = self._submitted.popleft()
        plan = submitted.plan
        assert result.step == plan.step
        for gate in result.arrived:
            self.arrive(gate)
        out: list[Progress] = []
        size, failed, bad_loads, num_given = self.block_size, result.failed, result.bad_loads, 0
        for i, (row, (request, epoch), tokens) in enumerate(zip(plan.rows, submitted.rows, result.tokens, strict=True)):
            request.num_in_flight -= 1
            reason = request.finish_reason
            if reason is not None:
                continue
            if bad_loads and submitted.loads.get(i) in bad_loads:
                self._take_back(request, row, submitted.loads[i])
                continue
            if request.arriving >= 0 and submitted.loads.get(i) == request.arriving:
                self._received(request, self.traffic.land(request), now)  # the step has waited for all of it
            if failed and row.request_id in failed:
                self._finish(request, FINISH_ERROR, now)
                out.append(Progress(request, [], error=failed[row.request_id]))
                continue
            if row.samples:
                request.num_unsampled -= 1 + row.num_draft
            before = request.num_computed
            if epoch == request.epoch:
                request.advance(row.num_tokens, row.num_draft - len(tokens) + 1 if row.num_draft else 0)
            after = request.num_computed
            prompt_logprobs = result.prompt_logprobs.get(i) if result.prompt_logprobs else None
            if prompt_logprobs is not None:
                prompt_logprobs = prompt_logprobs[max(0, request.num_logprobs_done - row.start) :]
                request.num_logprobs_done += len(prompt_logprobs)
            if tokens:
                tokens = request.append(tokens, now)
                num_given += len(tokens) if request.ticket is None else 0
                logprobs = result.logprobs.get(i) if result.logprobs else None
                out.append(Progress(request, tokens, logprobs and logprobs[: len(tokens)], prompt_logprobs))
            elif prompt_logprobs:
                out.append(Progress(request, [], None, prompt_logprobs))
            if before // size < after // size and self.kv.enabled:
                self.kv.publish(request)
            if self.kv.windows and before < after:
                self.kv.trim_windows(request, self._fence())
            reason = request.finish_reason
            if reason is not None:
                self._finish(request, reason, now)
        self.counters.generation_tokens += num_given
        if self.kv.windows or any(pool.num_limbo for pool in self.pools):
            self._num_returns += 1
        self.kv.end_filling(submitted.filling)
        self.kv.settle(plan.step)
        return out

    def _take_back(self, request: Request, row: Row, load: int) -> None:
        """A row has read KV that never came: what it computed is void, and the request begins again."""
        if row.samples:
            request.num_unsampled -= 1 + row.num_draft
        if request.arriving == load:
            self._requeue(request)

    # ---- endings ----

    def _finish(self, request: Request, reason: str, now: float) -> None:
        request.finish_reason = reason
        request.finish_s = now
        if self.requests.pop(request.id, None) is None:
            return
        if reason in (FINISH_STOP, FINISH_LENGTH):
            self.peak.finished(request.num_output)
        self._leave(request)

    def _preempt(self, request: Request, now: float) -> None:
        """Take a running request's blocks; it waits and recomputes, mostly from the prefix cache."""
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._requeue(request)
        self._gave_way.add(request.id)
        self.trace("preempted", request, now)

    def _requeue(self, request: Request) -> None:
        """Back to waiting, with nothing."""
        request.epoch += 1
        self._leave(request)
        self.kv.reset(request)
        request.queue_reason = "preempted"
        self.waiting.append(request)
        self._waiting_sorted = False

    def _leave(self, request: Request) -> None:
        """Out of the running or waiting set; blocks are released behind the steps in flight, deepest first."""
        self._num_returns += 1
        if request.is_running:
            request.is_running = False
            self.running.remove(request)
            self.traffic.drop(request)
            if request.is_on_rank:
                request.is_on_rank = False
                self._released.append(request.id)
        else:
            self.waiting.remove(request)
        self.kv.release(request, self._fence())

    def _fence(self) -> int:
        """Newest step in flight; -1 when none is."""
        return self._submitted[-1].plan.step if self._submitted else -1

    @staticmethod
    def _gate(request: Request) -> int:
        return min(request.waiting_for.values())
