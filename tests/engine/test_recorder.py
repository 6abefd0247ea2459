"""Recordings of schedulers replay to the same plans, byte for byte; a changed input is found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.fakes.executor import FakeExecutor, HashModel, fake_layout

from penstock.core.request import Request, SamplingParams
from penstock.core.scheduler import SchedulerLimits
from penstock.engine.recorder import RecordingScheduler, ReplayMismatch, Setup, replay


def record(path: Path, seed: int) -> int:
    """Run a random workload with a cancel, a gate and a forgotten cache; the number of plans asked for."""
    chance = random.Random(seed)
    layout = fake_layout((None, 12), 4)
    num_blocks = (24, 24)
    depth = chance.choice((1, 2))
    setup = Setup(layout, num_blocks, SchedulerLimits(6, chance.choice((5, 16, 64))), "priority", "m", True, True)
    num_plans = 0
    with path.open("wb") as file:
        scheduler = RecordingScheduler(setup, file)
        executor = FakeExecutor(
            layout, num_blocks, HashModel(layout), depth=depth, feeds_back=True, max_tokens=64, max_rows=6
        )
        now = 0.0
        for n in range(12):
            prompt = [chance.randrange(3) for _ in range(chance.randint(1, 20))]
            request = Request(
                f"r{n}",
                prompt,
                len(prompt),
                SamplingParams(max_tokens=40),
                n,
                len(prompt) + chance.randint(1, 30),
                stop_ids=frozenset((1, 2)),
                arrival_s=now,
                priority=chance.randint(0, 1),
            )
            scheduler.add(request)
            if n == 3:
                scheduler.hold_at("r3", "image", 1)
        while scheduler.has_work:
            now += 1.0
            if now == 5.0:
                scheduler.arrive("image")
            if now == 7.0:
                scheduler.finish("r5", "abort", now)
                scheduler.forget_cache()
            while scheduler.num_submitted < depth:
                plan = scheduler.plan(now)
                num_plans += 1
                if plan is None:
                    break
                executor.submit(plan)
            if scheduler.num_submitted:
                scheduler.commit(executor.collect(), now)
    return num_plans


@pytest.mark.parametrize("seed", range(8))
def test_a_recording_replays_to_equal_plans(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "record"
    num_plans = record(path, seed)
    assert num_plans > 10
    assert replay(path) == num_plans


def test_a_changed_input_is_found(tmp_path: Path) -> None:
    """Turning one request's priority around changes who runs first."""
    path = tmp_path / "record"
    record(path, 1)
    data = path.read_bytes()
    zero, one = b"\xa8priority\x00", b"\xa8priority\x01"
    assert zero in data
    assert one in data
    path.write_bytes(data.replace(zero, b"\xa8priority\x02").replace(one, zero))
    with pytest.raises(ReplayMismatch):
        replay(path)


def test_a_recording_cut_short_replays_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "record"
    num_plans = record(path, 2)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    assert 0 < replay(path) < num_plans
