"""Cost models: exact where they can be, monotone in hits, never below the floor."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.cost import FittedCost, MoveCost, Roofline, StepCoefficients, StepShape, fit_cost, fit_steps
from penstock.core.plan import Row, StepPlan

amounts = st.floats(0, 1e-2, allow_subnormal=False)
coefficients = st.builds(StepCoefficients, amounts, st.floats(0, 1e-4), amounts, st.floats(0, 1e-8), st.floats(0, 1e-7))
rooflines = st.builds(
    Roofline, st.floats(1e12, 1e15), st.floats(1e11, 1e13), st.floats(1e8, 1e11), st.floats(1e3, 1e6),
    st.floats(1e8, 1e11), st.floats(1e3, 1e6),
)  # fmt: skip


@given(coefficients, st.none() | rooflines, st.integers(1, 200_000), st.integers(16, 16_384), st.floats(0.1, 5))
@settings(deadline=None)
def test_a_longer_hit_never_costs_more(found, floor, length, chunk, correction):
    """Over all hits of a prompt, whatever the parameters; and with all of it in place nothing is left to pay."""
    cost = FittedCost(found, chunk, floor, correction=correction)
    prefix = np.unique(np.linspace(0, length, 300).astype(np.int64))
    seconds = cost.prefill_seconds_each(length - prefix, prefix)
    assert (np.diff(seconds) <= 1e-9 * seconds[:-1] + 1e-15).all()
    assert seconds[-1] == 0 and (seconds >= 0).all()


@given(coefficients, rooflines, st.integers(1, 65_536), st.integers(0, 65_536))
@settings(deadline=None)
def test_predictions_stay_above_the_floor(found, floor, new, prefix):
    cost = FittedCost(found, 8192, floor)
    compute, memory = floor.coefficients()
    shape = StepShape(new, 1, new * prefix, new + prefix)
    assert cost.step_seconds(shape) >= max(compute.seconds(shape), memory.seconds(shape))
    assert cost.prefill_seconds(new, prefix) >= new * compute.token


def test_a_prompt_of_one_step_costs_what_the_step_costs():
    """prefill_seconds and step_seconds agree where both speak: up to the half token per chunk of the integral."""
    cost = FittedCost(StepCoefficients(1e-3, 1e-5, 1e-4, 1e-9, 1e-8), 4096)
    plan = StepPlan(0, [Row("a", 1000, 3000, 0, 1, True, ())])
    assert cost.prefill_seconds(3000, 1000) == pytest.approx(cost.step_seconds(StepShape.of(plan)), rel=1e-3)


@given(coefficients, st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_a_fit_finds_what_made_the_times(truth, seed):
    """Exact times give back exact predictions; nothing is negative."""
    draw = random.Random(seed)
    shapes = [
        StepShape(n := draw.randint(1, 8192), draw.randint(1, 64), n * draw.randint(0, 30_000), draw.randint(1, 10**6))
        for _ in range(60)
    ]
    seconds = [truth.seconds(shape) for shape in shapes]
    if min(seconds) <= 1e-12:
        return
    found = fit_steps(shapes, seconds)
    for shape, second in zip(shapes, seconds, strict=True):
        assert found.seconds(shape) == pytest.approx(second, rel=1e-5)
    assert min(found.step, found.token, found.row, found.attended, found.context) >= 0


def test_a_fit_that_would_like_a_negative_parameter_does_without():
    """Times that fall with the batch: the slope is zero, not negative."""
    shapes = [StepShape(n, 1, 0, 0) for n in (10, 100, 1000)]
    found = fit_steps(shapes, [3.0, 2.0, 1.0])
    assert found.token == 0 and found.step + found.row > 0
    with pytest.raises(ValueError):
        fit_steps([], [])


def test_corrections_follow_the_machine_within_bounds():
    cost = fit_cost([(StepShape(n, 1, 0, 0), n * 1e-5) for n in (10, 100, 1000)], moves={"disk": MoveCost(0.001, 1e9)})
    shape = StepShape(500, 1, 0, 0)
    before = cost.step_seconds(shape)
    for _ in range(500):
        cost.observe_step(shape, 2 * before)
    assert cost.step_seconds(shape) == pytest.approx(2 * before, rel=1e-3)
    for _ in range(500):
        cost.observe_step(shape, 1e6)  # a machine that slept does not make every step an hour
    assert cost.step_seconds(shape) <= 4 * before * 1.001
    for _ in range(500):
        cost.observe_move(10**9, "disk", 3.003)
    assert cost.move_seconds(10**9, "disk") == pytest.approx(3.003, rel=1e-3)
    assert cost.move_seconds(1, "nowhere") == float("inf")
    cost.observe_move(1000, "nowhere", 1.0)
    assert cost.move_seconds(2000, "nowhere") == pytest.approx(2.0)
