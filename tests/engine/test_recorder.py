"""Recordings of schedulers replay to the same plans, byte for byte; a changed input is found."""

from __future__ import annotations

import io
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from tests.cluster.whole import Cluster
from tests.cluster.whole import Setting as ClusterSetting
from tests.core.world import Ask, Setting, World, asks_strategy, limits_of, settings_strategy, tape_strategy
from tests.fakes.executor import FakeExecutor, HashModel, fake_layout

from penstock.config.model import KVLayout
from penstock.core.request import Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
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


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(settings_strategy, asks_strategy, tape_strategy)
def test_any_schedule_replays(setting: Setting, asks: list[Ask], tape: list[int]) -> None:
    """Whatever happened, in whatever order: cancels, gates, failures, preemption, depth 2, forgotten caches."""
    file = io.BytesIO()

    def make(setting: Setting, layout: KVLayout, num_blocks: tuple[int, ...]) -> Scheduler:
        limits = limits_of(setting)
        setup = Setup(
            layout, num_blocks, limits, setting.policy, "m", setting.prefix_caching, feeds_back=setting.feeds_back
        )
        return RecordingScheduler(setup, file)

    world = World(replace(setting, hopeful=False, most_drafts=0), asks, make)
    for number in tape:
        world.turn(number)
    world.drain()
    world.check_answers()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record"
        path.write_bytes(file.getvalue())
        assert replay(path) >= world.scheduler.step


def test_a_cluster_replays_with_its_moves(tmp_path: Path) -> None:
    """Receipts, sends, loads and saves, tokens from elsewhere: as each engine's scheduler was told of them."""
    recordings: dict[str, io.BytesIO] = {}
    setting = replace(ClusterSetting(), num_blocks=24, windows=(None, 6))
    cluster = Cluster(setting, 3, recordings)
    cluster.clock.run_until(0.1)
    for n in range(9):
        cluster.ask([*range(200, 240), 600 + n], 6)
        cluster.ask([*range(300, 330 + n)], 6)
        cluster.clock.run_until(cluster.clock.now() + 0.15)
        if n % 3 == 2:
            for node in cluster.nodes.values():
                node.scheduler.forget_cache()
    cluster.run()
    cluster.check()
    data = b"".join(file.getvalue() for file in recordings.values())
    assert all(word in data for word in (b"\xa5offer", b"\xa5moved", b"\xa4give", b"\xa4save"))
    num_plans = 0
    for name, file in recordings.items():
        path = tmp_path / name
        path.write_bytes(file.getvalue())
        num_plans += replay(path)
        changed = file.getvalue().replace(b"\xa6device", b"\xa6devise")
        if changed != file.getvalue():
            path.write_bytes(changed)
            with pytest.raises(ReplayMismatch, match="moves something else"):
                replay(path)
    assert num_plans > 50
