"""Rules of the scheduler one by one, each with the smallest situation in which breaking it shows."""

from __future__ import annotations

import pytest
from tests.core.checks import check_scheduler
from tests.fakes.executor import FakeExecutor, HashModel, fake_layout

from penstock.core.plan import StepPlan
from penstock.core.policy import POLICIES
from penstock.core.request import Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits

BLOCK = 4


class Wants:
    """A DraftAllocator that always wants the same."""

    def __init__(self, num_draft: int) -> None:
        self.wanted = num_draft

    def num_draft(self, request: Request) -> int:
        return self.wanted


class Bench:
    """A scheduler over `usable` blocks of four tokens, and a pretended rank."""

    def __init__(
        self,
        usable: int,
        *,
        step_tokens: int = 64,
        max_num_seqs: int = 8,
        policy: str = "fcfs",
        num_draft: int = 0,
        max_wait_s: float = 5.0,
        depth: int = 1,
        feeds_back: bool = True,
    ) -> None:
        layout = fake_layout((None,), BLOCK)
        self.scheduler = Scheduler(
            layout,
            (usable + 1,),
            SchedulerLimits(max_num_seqs, step_tokens, max_wait_s),
            POLICIES[policy](),
            feeds_back=feeds_back,
            drafts=Wants(num_draft) if num_draft else None,
        )
        self.executor = FakeExecutor(layout, (usable + 1,), HashModel(layout), depth=depth, feeds_back=feeds_back)
        self.now = 0.0

    def add(
        self, name: str, prompt: list[int], output: int, *, arrival_s: float | None = None, priority: int = 0
    ) -> Request:
        request = Request(
            name,
            list(prompt),
            len(prompt),
            SamplingParams(max_tokens=output),
            1,
            len(prompt) + output,
            arrival_s=self.now if arrival_s is None else arrival_s,
            priority=priority,
        )
        self.scheduler.add(request)
        return request

    def plan(self) -> StepPlan | None:
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        check_scheduler(self.scheduler)
        if plan is not None:
            self.executor.submit(plan)
        return plan

    def commit(self) -> None:
        self.scheduler.commit(self.executor.collect(), self.now)
        check_scheduler(self.scheduler)

    def step(self) -> list[str]:
        """Plan and commit one step; who was in it."""
        plan = self.plan()
        if plan is None:
            return []
        self.commit()
        return [row.request_id for row in plan.rows]


def believe_in_short_outputs(scheduler: Scheduler) -> None:
    for _ in range(1000):
        scheduler.peak.finished(1)


def test_drafts_take_no_other_decodes_token() -> None:
    """Three decodes, a budget of five, a wish for eight drafts each: everybody has its token, two drafts are left."""
    bench = Bench(100, step_tokens=5, num_draft=8)
    for n in range(3):
        bench.add(f"r{n}", [n], 30)
    for _ in range(3):
        bench.step()
    plan = bench.plan()
    assert plan is not None
    assert [(row.request_id, row.num_tokens - row.num_draft) for row in plan.rows] == [("r0", 1), ("r1", 1), ("r2", 1)]
    assert sum(row.num_draft for row in plan.rows) == 2


def test_drafts_take_nobodys_blocks() -> None:
    """A guess is not worth a preemption: with no free block the row goes without, and nobody gives way."""
    bench = Bench(5)
    believe_in_short_outputs(bench.scheduler)
    bench.add("a", [1] * 9, 8)
    bench.add("b", [4] * 3, 8)
    while bench.scheduler.pools[0].num_available:
        assert bench.step() == ["a", "b"]
    bench.scheduler.drafts = Wants(4)  # for which "a" would need one block more
    plan = bench.plan()
    assert plan is not None
    assert [(row.request_id, row.num_draft) for row in plan.rows] == [("a", 0), ("b", 2)]
    assert bench.scheduler.counters.num_preemptions == 0


@pytest.mark.parametrize("urgent_output", [8, 12])
def test_an_urgent_request_does_not_give_way_to_a_lax_one(urgent_output: int) -> None:
    """Pipeline stages: the urgent request's last token is in flight, so only the lax one is in this plan. It lacks a
    block, and waits or gives way itself.
    """
    bench = Bench(5, policy="priority", depth=2, feeds_back=False)
    believe_in_short_outputs(bench.scheduler)
    urgent = bench.add("urgent", [1] * 5, urgent_output, priority=0)
    bench.plan()
    lax = bench.add("lax", [2] * 4, 8, priority=5)
    while bench.scheduler.has_work:
        if bench.scheduler.num_submitted < 2:
            bench.plan()
        bench.commit()
    assert urgent.num_preemptions == 0
    assert lax.finish_reason == urgent.finish_reason == "length"


def test_who_is_about_to_end_is_waited_for() -> None:
    """At depth 2 a request whose last token is being sampled gives its blocks back soon: nobody gives way meanwhile."""
    bench = Bench(8, depth=2)
    believe_in_short_outputs(bench.scheduler)
    bench.add("ending", [1] * 5, 6)
    bench.add("going", [2] * 8, 12)
    bench.plan()
    bench.commit()
    bench.add("young", [3] * 3, 12)
    while bench.scheduler.has_work:
        bench.plan()
        bench.commit()
    assert bench.scheduler.counters.num_preemptions == 0


def test_an_overdue_request_is_not_overtaken_while_it_waits_for_a_shared_block() -> None:
    """Passed over for memory long ago, now waiting a step for a block that another computes: still nobody overtakes."""
    bench = Bench(16, max_wait_s=3.0)
    prefix = list(range(24))
    bench.add("filler", [90] * 40, 8)
    assert bench.step() == ["filler"]
    overdue = bench.add("overdue", [*prefix, 50], 8)
    while "filler" in bench.scheduler.requests:
        bench.step()
    assert overdue.passed_over_s is not None
    assert overdue.admitted_s is None
    bench.add("owner", [*prefix, 60], 8, arrival_s=-1.0)
    bench.add("late", [80], 2)
    assert bench.step() == ["owner"]
    assert overdue.queue_reason == "shared_block"
    assert "overdue" in bench.step()


def test_shut_gates_hold_up_nobody_behind_them() -> None:
    """More requests than the look-ahead wait for their images; the text request behind them starts at once."""
    bench = Bench(100, max_num_seqs=4)
    for n in range(70):
        bench.add(f"image{n}", [n] * 6, 2)
        bench.scheduler.hold_at(f"image{n}", f"image:{n}", 0)
    bench.add("text", [1, 2, 3], 2)
    assert bench.step() == ["text"]
    assert bench.scheduler.requests["image0"].queue_reason == "image"


def test_siblings_of_a_long_prompt_run_together() -> None:
    """Samples of a prompt that takes two thirds of the pool, one of them late: its blocks are there once."""
    bench = Bench(32)
    prompt = list(range(81))
    for n in range(4):
        bench.add(f"s{n}", prompt, 6)
    for _ in range(3):
        bench.step()
    bench.add("s4", prompt, 6)
    bench.step()
    assert sorted(r.id for r in bench.scheduler.running) == ["s0", "s1", "s2", "s3", "s4"]
    while bench.scheduler.has_work:
        bench.step()
    assert bench.scheduler.counters.num_preemptions == 0


def test_a_prompt_that_would_be_evicted_is_not_started() -> None:
    """It would fit now, but not when those that run have grown."""
    bench = Bench(20)
    bench.add("long", [1] * 20, 40)  # grows to 15 blocks
    bench.step()
    late = bench.add("late", [2] * 24, 24)  # 7 blocks now, 12 at its end; there are 14 free now
    bench.step()
    assert late.queue_reason == "capacity"
    while "long" in bench.scheduler.requests:
        bench.step()
        if late.admitted_s is not None:
            break
    while bench.scheduler.has_work:
        bench.step()
    assert late.finish_reason == "length"
    assert bench.scheduler.counters.num_preemptions == 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_least_computed_gives_way(policy: str) -> None:
    """Among equally urgent requests: the one that is cheapest to redo."""
    make = POLICIES[policy]()
    few = Request("few", [1], 1, SamplingParams(), 0, 9, arrival_s=0.0, num_computed=3)
    many = Request("many", [1], 1, SamplingParams(), 0, 9, arrival_s=1.0, num_computed=30)
    assert make.victim([few, many], 0.0) is few
    assert make.order([many, few], 0.0) == [few, many]
    many.priority = -1
    assert make.order([many, few], 0.0)[0] is (many if policy == "priority" else few)


def test_decodes_go_before_a_long_prompt() -> None:
    """A chunked prompt takes what the decodes leave of the budget, in every step, also of a small budget."""
    bench = Bench(100, step_tokens=8)
    for n in range(3):
        bench.add(f"d{n}", [n, n, n], 30)
    bench.step()
    bench.step()
    bench.add("long", list(range(40)), 4)
    for _ in range(5):
        plan = bench.plan()
        assert plan is not None
        assert {row.request_id: row.num_tokens for row in plan.rows} == {"d0": 1, "d1": 1, "d2": 1, "long": 5}
        bench.commit()


def test_a_gate_stops_a_prompt_at_its_position() -> None:
    """The text before the image is computed meanwhile; the rest when the gate opens; a failed gate ends the request."""
    bench = Bench(100)
    request = bench.add("a", list(range(30)), 2)
    bench.scheduler.hold_at("a", "image:x", 18)
    assert bench.step() == ["a"]
    assert request.num_computed == 18
    assert bench.step() == []
    bench.scheduler.arrive("image:x")
    bench.step()
    assert (request.num_computed, request.num_output) == (30, 1)
    other = bench.add("b", list(range(50, 60)), 2)
    bench.scheduler.hold_at("b", "image:y", 4)
    bench.step()
    assert bench.scheduler.fail("image:y", bench.now) == [other]
    assert other.finish_reason == "error"
    check_scheduler(bench.scheduler)
