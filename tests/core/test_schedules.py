"""Whatever happens in whatever order: blocks add up, nothing waits for ever, and every request gets its solo tokens.

A schedule is a setting, a few requests and a tape of numbers that say what happens next, so that a failure shrinks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from tests.core.checks import check_scheduler
from tests.core.world import Ask, Setting, World, asks_strategy, settings_strategy, tape_strategy

QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@settings(QUICK, max_examples=900)
@given(settings_strategy, asks_strategy, tape_strategy)
def test_any_schedule_gives_the_solo_tokens_and_loses_no_block(
    setting: Setting, asks: list[Ask], tape: list[int]
) -> None:
    """Arrivals, cancels, gates, failures, tiny pools, drafts, depth 2: counts exact after each, answers as alone."""
    note(f"{setting}\n{asks}\n{tape}")
    world = World(setting, asks)
    for number in tape:
        world.turn(number)
    world.drain()
    world.check_answers()


@settings(QUICK, max_examples=400)
@given(
    settings_strategy,
    st.lists(
        st.builds(
            Ask,
            prefix=st.integers(0, 2),
            shared=st.integers(0, 20),
            own=st.integers(1, 6),
            max_tokens=st.integers(16, 48),
            priority=st.integers(0, 2),
            siblings=st.sampled_from([1, 2, 4]),
        ),
        min_size=3,
        max_size=6,
    ),
    st.integers(0, 8),
    tape_strategy,
)
def test_forced_preemption_changes_no_token(setting: Setting, asks: list[Ask], spare: int, tape: list[int]) -> None:
    """Admission that believes in outputs of one token, in pools that hold little more than the longest request."""
    world = World(replace(setting, spare_blocks=spare, hopeful=True, max_num_seqs=8), asks)
    for number in tape:
        world.turn(number)
    world.drain()
    world.check_answers()


def test_forced_preemption_does_preempt() -> None:
    """The test above would prove nothing if nobody were preempted."""
    asks = [Ask(own=3, max_tokens=40, siblings=4), Ask(prefix=1, shared=9, max_tokens=30)]
    for depth in (1, 2):
        world = World(Setting(spare_blocks=3, hopeful=True, stops=False, depth=depth), list(asks))
        world.drain()
        world.check_answers()
        assert world.scheduler.counters.num_preemptions >= 3


def test_a_victim_does_not_come_back_in_the_plan_that_took_its_blocks() -> None:
    """What it left free would do for the start of its prompt, and the next step would take it away again.

    The world checks it of every plan; here are two siblings that must recompute their prompts, in too small a pool.
    """
    asks = [Ask(max_tokens=1), Ask(shared=7, max_tokens=16, prompt_logprobs=True, siblings=2)]
    world = World(Setting(spare_blocks=0, hopeful=True, stops=False), asks)
    world.drain()
    world.check_answers()
    assert world.scheduler.counters.num_preemptions


@settings(QUICK, max_examples=300)
@given(
    st.lists(
        st.builds(
            Ask,
            prefix=st.integers(0, 2),
            shared=st.integers(0, 40),
            own=st.integers(1, 6),
            max_tokens=st.integers(1, 40),
            siblings=st.sampled_from([1, 1, 3]),
        ),
        min_size=2,
        max_size=6,  # with siblings at most 18: the predictor goes by max_tokens until 20 requests have finished
    ),
    st.integers(0, 16),
    st.sampled_from([1, 2]),
    st.sampled_from([(None,), (None, 6), (7,)]),
    st.sampled_from([4096, 64, 16]),
    st.lists(st.booleans(), min_size=10, max_size=40),
)
def test_nobody_is_preempted_while_lengths_come_out_as_predicted(
    asks: list[Ask],
    spare: int,
    depth: int,
    windows: tuple[int | None, ...],
    step_tokens: int,
    arrivals: list[bool],
) -> None:
    """Outputs of exactly max_tokens, shared prefixes and siblings, arrivals at any step, pools for one or a few."""
    setting = Setting(
        windows=windows,
        spare_blocks=spare,
        depth=depth,
        stops=False,
        max_num_seqs=30,
        max_num_batched_tokens=step_tokens,
    )
    world = World(setting, asks)
    for arrives in arrivals:
        if arrives and world.asks:
            world.add(world.asks.pop(0))
        world.turn(0)
    world.drain()
    world.check_answers()
    assert world.scheduler.counters.num_preemptions == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", ["cancel", "row fails", "preempt"])
def test_whoever_waits_for_a_block_survives_the_death_of_its_owner(how: str, depth: int) -> None:
    """Four requests with one long prefix, computed 8 tokens a step; the owner dies at each point of the schedule."""
    setting = Setting(max_num_batched_tokens=8, depth=depth, stops=False)
    num_killed = num_waiting = 0
    for when in range(60):
        world = World(setting, [Ask(shared=40, own=2, max_tokens=4, siblings=4)])
        world.add(world.asks.pop())
        for _ in range(when):
            world.turn(0)
        owners = world.owners()
        if owners:
            num_killed += 1
            num_waiting += any(r.queue_reason == "shared_block" for r in world.scheduler.waiting)
            if how == "cancel":
                world.end(owners[0])
            elif how == "row fails":
                world.executor.failing.add(owners[0].id)
            else:
                world.scheduler._preempt(owners[0], world.now)
                check_scheduler(world.scheduler)
        world.drain()
        world.check_answers()
        if how == "preempt":
            assert all(r.finish_reason == "length" for r in world.requests.values())
    assert num_killed >= 5
    assert num_waiting >= 5


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("max_wait_s", [0.0, 7.0, 20.0])
def test_a_stream_of_small_requests_starves_nobody(max_wait_s: float, policy: str, depth: int) -> None:
    """The bound: `max_queue_wait_s` after a request was first passed over for lack of memory, nobody behind it in the
    policy's order starts before it; so it starts when those that run then, and those before it, have ended.
    """
    setting = Setting(spare_blocks=2, depth=depth, policy=policy, stops=False, max_queue_wait_s=max_wait_s)
    small = Ask(own=5, max_tokens=6)
    big = Ask(own=50, max_tokens=6)
    world = World(setting, [big])
    world.asks.clear()
    for n in range(200):
        if n % 2 == 0:
            world.add(small)
        if n == 20:
            waiting = world.scheduler.waiting
            ahead = len(waiting) + len(world.scheduler.running)
            request = world.add(big)[0]
            bound_s = world.now + max_wait_s + (ahead + 1) * (small.max_tokens + depth)
        while world.submit() is not None:
            pass
        world.collect()
        if n >= 20 and request.admitted_s is not None:
            break
    assert request.admitted_s is not None
    assert request.admitted_s <= bound_s
    overtook = [r for r in world.requests.values() if r.arrival_s > request.arrival_s and r.admitted_s is not None]
    assert bool(overtook) == (max_wait_s > 0.0), "what does not fit is passed over for a bounded time only"
    world.drain()
    world.check_answers()
