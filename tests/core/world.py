"""A scheduler, a pretended rank, and everything that can happen to them, played from a tape of numbers.

Shared by the schedule tests and the recorder's. Checks after each thing it does; knows what each request must get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st
from tests.core.checks import check_idle, check_scheduler
from tests.fakes.executor import EOS_IDS, FakeExecutor, HashModel, fake_layout
from tests.fakes.tiers import WAITING, FakeTiers

from penstock.config.model import KVLayout
from penstock.core.plan import StepPlan
from penstock.core.policy import POLICIES
from penstock.core.request import FINISH_ABORT, FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits

BLOCK_SIZE = 4
PREFIXES = [[(7 * p + 3 * i) % 91 for i in range(48)] for p in range(3)]


class HashedDrafts:
    """A DraftAllocator that wants 0 to `most` drafts, differently each time."""

    def __init__(self, most: int) -> None:
        self.most, self.num_calls = most, 0

    def num_draft(self, request: Request) -> int:
        self.num_calls += 1
        return hash((self.num_calls, len(request.token_ids))) % (self.most + 1)


@dataclass(frozen=True)
class Setting:
    """What a schedule runs on. `spare_blocks`: per group, beyond what the longest request needs alone."""

    windows: tuple[int | None, ...] = (None,)
    spare_blocks: int = 40
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    depth: int = 1
    feeds_back: bool = True
    lazy: bool = True
    prefix_caching: bool = True
    policy: str = "fcfs"
    most_drafts: int = 0
    guess_percent: int = 60
    max_queue_wait_s: float = 6.0
    stops: bool = True  # requests may end before max_tokens
    tiers: bool = False  # what left the device can be loaded again
    hopeful: bool = False  # expects outputs of one token, so that running requests must be preempted


@dataclass(frozen=True)
class Ask:
    """A request to come. Its prompt is the first `shared` tokens of a common text and `own` tokens of its own."""

    prefix: int = 0
    shared: int = 0
    own: int = 1
    max_tokens: int = 8
    priority: int = 0
    prompt_logprobs: bool = False
    salt: str = ""
    siblings: int = 1  # as n > 1: the same prompt, other seeds


settings_strategy = st.builds(
    Setting,
    windows=st.sampled_from([(None,), (None, 6), (7,), (None, 1), (None, 5, 11)]),
    spare_blocks=st.sampled_from([40, 0, 2, 4, 6, 10]),
    max_num_seqs=st.sampled_from([8, 1, 2, 4]),
    max_num_batched_tokens=st.sampled_from([64, 1, 7, 16]),
    depth=st.sampled_from([1, 2]),
    feeds_back=st.sampled_from([True, True, False]),
    lazy=st.booleans(),
    prefix_caching=st.sampled_from([True, True, True, False]),
    policy=st.sampled_from(["fcfs", "priority"]),
    most_drafts=st.sampled_from([0, 0, 1, 4]),
    guess_percent=st.sampled_from([60, 0, 100]),
    hopeful=st.booleans(),
    tiers=st.booleans(),
)
asks_strategy = st.lists(
    st.builds(
        Ask,
        prefix=st.integers(0, 2),
        shared=st.integers(0, 40),
        own=st.integers(1, 6),
        max_tokens=st.one_of(st.integers(1, 12), st.integers(16, 40)),
        priority=st.integers(0, 2),
        prompt_logprobs=st.sampled_from([False, False, False, True]),
        salt=st.sampled_from(["", "", "", "s"]),
        siblings=st.sampled_from([1, 1, 1, 3]),
    ),
    min_size=1,
    max_size=8,
)
tape_strategy = st.lists(st.integers(0, 32 * 64 - 1), min_size=20, max_size=120)


SchedulerMaker = Callable[[Setting, KVLayout, tuple[int, ...]], Scheduler]


def plain_scheduler(setting: Setting, layout: KVLayout, num_blocks: tuple[int, ...]) -> Scheduler:
    """The scheduler of a setting."""
    return Scheduler(
        layout,
        num_blocks,
        limits_of(setting),
        POLICIES[setting.policy](),
        model_id="m",
        prefix_caching=setting.prefix_caching,
        feeds_back=setting.feeds_back,
        drafts=HashedDrafts(setting.most_drafts) if setting.most_drafts else None,
    )


def limits_of(setting: Setting) -> SchedulerLimits:
    """The scheduler's limits of a setting."""
    return SchedulerLimits(setting.max_num_seqs, setting.max_num_batched_tokens, setting.max_queue_wait_s)


class World:
    """A scheduler, a pretended rank and everything that can happen to them. Checks after everything it does."""

    def __init__(self, setting: Setting, asks: Sequence[Ask], make: SchedulerMaker = plain_scheduler) -> None:
        self.setting = setting
        self.layout = fake_layout(setting.windows, BLOCK_SIZE)
        longest = max(ask.shared + ask.own + ask.max_tokens for ask in asks)
        num_blocks = tuple(
            1 + setting.spare_blocks + -(-(longest if window is None else min(longest, 24)) // BLOCK_SIZE)
            for window in setting.windows
        )
        self.model = HashModel(self.layout)
        self.scheduler = make(setting, self.layout, num_blocks)
        if setting.hopeful:
            for _ in range(1000):
                self.scheduler.peak.finished(1)
        self.executor = FakeExecutor(
            self.layout,
            num_blocks,
            self.model,
            depth=setting.depth,
            feeds_back=setting.feeds_back,
            lazy=setting.lazy,
            guess_percent=setting.guess_percent,
            max_tokens=setting.max_num_batched_tokens,
            max_rows=setting.max_num_seqs,
        )
        self.tiers = FakeTiers(self.scheduler, self.executor) if setting.tiers else None
        self.asks = list(asks)
        self.now = 0.0
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, list[object]] = {}
        self.errors: dict[str, str] = {}
        self.ended_outside: set[str] = set()
        self.gates: list[str] = []
        self.num_gates = 0

    # ---- what can happen ----

    def add(self, ask: Ask) -> list[Request]:
        """Queue a request and its siblings."""
        limit = self.scheduler.kv.max_request_tokens()
        added = []
        number = len(self.requests)
        own = [100 + number * 10 + i for i in range(ask.own)]
        prompt = PREFIXES[ask.prefix][: ask.shared] + own
        prompt = prompt[: limit - 1]
        for index in range(ask.siblings):
            request = Request(
                id=f"r{number}.{index}",
                token_ids=list(prompt),
                prompt_len=len(prompt),
                params=SamplingParams(max_tokens=ask.max_tokens, prompt_logprobs=1 if ask.prompt_logprobs else None),
                seed=1000 * number + index,
                max_total=min(limit, len(prompt) + ask.max_tokens),
                stop_ids=EOS_IDS if self.setting.stops else frozenset(),
                arrival_s=self.now,
                priority=ask.priority,
                salt=ask.salt,
            )
            self.requests[request.id] = request
            self.outputs[request.id] = []
            self.prompt_logprobs[request.id] = []
            self.scheduler.add(request)
            added.append(request)
        check_scheduler(self.scheduler)
        return added

    def submit(self) -> StepPlan | None:
        """Plan a step and hand it to the rank, if it may have one more."""
        scheduler = self.scheduler
        if scheduler.num_submitted >= self.setting.depth:
            return None
        before = list(scheduler.running)
        waiting_before = list(scheduler.waiting)
        preemptions = {r.id: r.num_preemptions for r in before}
        decodes = [r for r in before if r.num_pending == 1 and self._may_run(r)]
        plan = scheduler.plan(self.now)
        check_scheduler(scheduler)
        if plan is None:
            if self.tiers is not None:
                self.tiers.start()
            return None
        planned = {row.request_id for row in plan.rows}
        preempted = {r.id for r in before if r.num_preemptions != preemptions[r.id]}
        assert not planned & preempted, "a victim is in the plan that was being built"
        assert {a.request_id for a in plan.admitted} <= planned
        if len(decodes) <= self.setting.max_num_batched_tokens:
            for request in decodes:
                assert request.id in planned | preempted or self._lacks_blocks(request), f"{request.id} stands still"
        self._check_overtaking(waiting_before, {a.request_id for a in plan.admitted})
        if self.tiers is not None:
            self.tiers.start()
        self.executor.submit(plan)
        assert self.executor.request_ids == {r.id for r in scheduler.running if r.is_on_rank}
        self.now += 1.0
        return plan

    def collect(self) -> bool:
        """Take the oldest step's result in."""
        if not self.scheduler.num_submitted:
            return False
        for progress in self.scheduler.commit(self.executor.collect(), self.now):
            id_ = progress.request.id
            assert id_ not in self.ended_outside
            self.outputs[id_] += progress.token_ids
            self.prompt_logprobs[id_] += progress.prompt_logprobs or []
            if progress.error is not None:
                self.errors[id_] = progress.error
        check_scheduler(self.scheduler)
        if self.tiers is not None:
            self.tiers.save()
        return True

    def end(self, request: Request, reason: str = FINISH_ABORT) -> None:
        """End a request from outside."""
        assert self.scheduler.finish(request.id, reason, self.now) is request
        self.ended_outside.add(request.id)
        check_scheduler(self.scheduler)

    def owners(self) -> list[Request]:
        """Live requests whose rows in flight fill blocks that others may wait for."""
        return [
            request
            for submitted in self.scheduler._submitted
            for request, _ in submitted.rows
            if submitted.filling and self.scheduler.requests.get(request.id) is request
        ]

    def turn(self, number: int) -> None:
        """What one number of the tape stands for."""
        kind, arg = number % 32, number // 32
        live = list(self.scheduler.requests.values())
        if kind < 14:
            if self.submit() is None:
                self.collect()
        elif kind < 18:
            self.collect()
        elif kind < 24:
            if self.asks:
                self.add(self.asks.pop(0))
        elif kind == 24 and live:
            self.end(live[arg % len(live)])
        elif kind == 25:
            owners = self.owners()
            if owners:
                self.end(owners[arg % len(owners)], FINISH_ERROR)
        elif kind >= 26:
            self._disturb(kind, arg, live)
            check_scheduler(self.scheduler)

    def _disturb(self, kind: int, arg: int, live: list[Request]) -> None:
        """Gates that shut, open and fail; rows that fail; a cache that is forgotten; time that passes."""
        if kind == 26 and live:
            request = live[arg % len(live)]
            gate = f"image:{self.num_gates}"
            self.num_gates += 1
            self.scheduler.hold_at(request.id, gate, arg % (request.max_total + 1))
            self.gates.append(gate)
        elif kind == 27 and self.gates:
            self.scheduler.arrive(self.gates.pop(arg % len(self.gates)))
        elif kind == 28 and self.gates:
            self.executor.arriving.append(self.gates.pop(arg % len(self.gates)))
        elif kind == 29 and self.gates and arg % 4 == 0:
            for request in self.scheduler.fail(self.gates.pop(arg % len(self.gates)), self.now):
                self.ended_outside.add(request.id)
        elif kind == 30 and live:
            if arg % 2:
                self.executor.failing.add(live[arg % len(live)].id)
            elif arg % 3 == 0:
                self.scheduler.forget_cache()
        elif kind == 31:
            self.now += arg % 9
            if self.tiers is not None and self.tiers.pending and arg % 4:
                self.tiers.land(arg, self.now)

    def drain(self) -> None:
        """Let everything that is there end by itself. Fails when nothing moves, or when it takes too long."""
        while self.asks:
            self.add(self.asks.pop(0))
        bound = 200 + 20 * sum(r.max_total for r in self.scheduler.requests.values())
        if self.tiers is not None:
            bound *= 2  # a load that fails is begun again
        while self.scheduler.has_work or (self.tiers is not None and self.tiers.pending):
            bound -= 1
            assert bound, "too many steps"
            moved = False
            while self.submit() is not None:
                moved = True
            moved |= self.collect()
            if not moved and self.tiers is not None:
                self.tiers.start()
                if self.tiers.pending:
                    self.tiers.land(bound, self.now)
                    continue
                self.now += 1.0
                num_offers = self.tiers.num_offers
                no_gate = not self.gates and not self.executor.arriving
                if self.submit() is not None or (no_gate and self.tiers.num_offers > num_offers):
                    continue  # a tier was asked: it will say something else next time
            if not moved:
                stuck = list(self.scheduler.requests.values())
                assert any(r.waiting_for for r in stuck), f"nothing moves: {[(r.id, r.queue_reason) for r in stuck]}"
                self.scheduler.arrive((self.gates or self.executor.arriving).pop(0))

    # ---- what must hold ----

    def check_answers(self) -> None:
        """Everybody ended, with the tokens it gets alone."""
        check_idle(self.scheduler)
        for id_, request in self.requests.items():
            expected, got = self.model.solo_tokens(request), self.outputs[id_]
            assert got == request.token_ids[request.prompt_len :]
            if request.finish_reason in (FINISH_STOP, FINISH_LENGTH):
                assert got == expected
                assert (request.finish_reason == FINISH_STOP) == (expected[-1] in request.stop_ids)
                if request.params.prompt_logprobs is not None:
                    assert self.prompt_logprobs[id_] == self.model.solo_prompt_logprobs(request)
            else:
                assert id_ in self.ended_outside or id_ in self.errors
                assert got == expected[: len(got)]

    def _may_run(self, request: Request) -> bool:
        """May its next token be computed as far as the request itself is concerned?"""
        if request.num_unsampled and (not self.setting.feeds_back or request.num_known >= request.max_total):
            return False
        gate = min(request.waiting_for.values(), default=1 << 30)
        return gate > request.num_computed + request.num_planned

    def _lacks_blocks(self, request: Request) -> bool:
        needed = -(-(request.num_computed + request.num_planned + 1) // BLOCK_SIZE)
        return any(
            needed - len(table) > pool.num_available
            for pool, table in zip(self.scheduler.pools, request.block_tables, strict=True)
        )

    def _check_overtaking(self, waiting: Sequence[Request], admitted: set[str]) -> None:
        """The bound on waiting: once passed over for `max_queue_wait_s`, nobody later in the order starts first."""
        order = self.scheduler.policy.order(waiting, self.now)
        overdue = False
        for request in order:
            if request.id in admitted:
                assert not overdue, f"{request.id} overtakes a request that has waited long enough"
            elif request.passed_over_s is not None and request.queue_reason not in ("image", WAITING):
                overdue |= self.now - request.passed_over_s > self.setting.max_queue_wait_s
