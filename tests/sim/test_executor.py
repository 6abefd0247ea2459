"""The pretended rank: steps take what the model says, one after another; tokens do not depend on the schedule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.config.model import KVGroup, KVLayout
from penstock.core.cost import FittedCost, StepCoefficients
from penstock.core.policy import FcfsPolicy
from penstock.core.request import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import AddRequest, Tokens
from penstock.sim.clock import VirtualClock
from penstock.sim.executor import SimExecutor

LAYOUT = KVLayout((KVGroup(0, "full", (0,), None, 4, 1, 8, "float32"),))
COST = FittedCost(StepCoefficients(step=0.001, token=0.0001, attended=1e-6))


def answers(prompts, num_blocks, depth, budget, slowness=1.0):
    """Tokens per request of an engine that gets all prompts at once, and when it was done."""
    clock = VirtualClock()
    executor = SimExecutor(COST, clock, depth=depth, slowness=slowness)
    scheduler = Scheduler(LAYOUT, (num_blocks,), SchedulerLimits(8, budget), FcfsPolicy())
    engine = Engine(scheduler, executor, EngineLimits(4 * num_blocks, 1000, frozenset()))
    out: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        assert not engine.handle(AddRequest(str(n), prompt, SamplingParams(max_tokens=5), n, 0.0), 0.0)
    while engine.has_work:
        engine.launch(clock.now())
        clock.run_until(executor.ready_s)
        for message in engine.complete(executor.collect(), clock.now()):
            if isinstance(message, Tokens):
                for delta in message.deltas:
                    out.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert clock.now() == pytest.approx(executor.busy_s)
    return out, clock.now()


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(12, 60), st.sampled_from([1, 2]), st.integers(8, 64),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_tokens_depend_on_the_request_alone(prompts, num_blocks, depth, budget):
    """Not on memory (preemption), depth, chunks or neighbours."""
    out, _ = answers(prompts, num_blocks, depth, budget)
    for n, prompt in enumerate(prompts):
        assert out[str(n)] == answers([[0]] * n + [prompt], 100, 1, 1000)[0][str(n)]


def test_a_straggler_takes_longer_and_early_collection_is_an_error():
    prompts = [[1, 2, 3]] * 3
    assert answers(prompts, 50, 1, 16, 2.0)[1] == pytest.approx(2 * answers(prompts, 50, 1, 16)[1])
    clock = VirtualClock()
    executor = SimExecutor(COST, clock)
    scheduler = Scheduler(LAYOUT, (9,), SchedulerLimits(8, 16), FcfsPolicy())
    engine = Engine(scheduler, executor, EngineLimits(30, 1000, frozenset()))
    engine.handle(AddRequest("a", [1, 2], SamplingParams(), 0, 0.0), 0.0)
    assert executor.ready_s is None
    engine.launch(0.0)
    with pytest.raises(AssertionError):
        executor.collect()
