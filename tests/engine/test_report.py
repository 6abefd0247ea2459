"""The engine's numbers: when they are sent, and that the block map says what the counts say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from tests.fakes.executor import EOS_IDS, VOCAB_SIZE, FakeExecutor, HashModel, fake_layout

from penstock.core.policy import FcfsPolicy
from penstock.core.request import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    HandOffs,
    KVReport,
    LinkReport,
    Report,
    TierReport,
    Watch,
)
from penstock.engine.report import MAX_CELLS, MIN_INTERVAL_S

BLOCK = 4


def make_engine(num_blocks: int, depth: int, windows: tuple[int | None, ...] = (None,)) -> Engine:
    layout = fake_layout(windows, BLOCK)
    sizes = (num_blocks,) * len(windows)
    executor = FakeExecutor(layout, sizes, HashModel(layout), depth=depth)
    scheduler = Scheduler(layout, sizes, SchedulerLimits(6, 32), FcfsPolicy())
    return Engine(scheduler, executor, EngineLimits(96, VOCAB_SIZE, EOS_IDS))


def decode_cells(kv: KVReport) -> Counter[str]:
    """Blocks by letter."""
    drawn: Counter[str] = Counter()
    at = 0
    while at < len(kv.cells):
        end = at + 1
        while end < len(kv.cells) and kv.cells[end].isdigit():
            end += 1
        drawn[kv.cells[at]] += int(kv.cells[at + 1 : end])
        at = end
    return drawn


@pytest.mark.parametrize("windows", [(None,), (None, 6), (7,)])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_map_and_the_counts_agree_at_every_moment(depth: int, windows: tuple[int | None, ...]) -> None:
    """Also for blocks in limbo: released and published, but a step in flight may still touch them."""
    engine = make_engine(48, depth, windows)
    num_reports = num_limbo = 0
    engine.handle(Watch(1e9, 0.0), 0.0)
    for n in range(80):
        now = float(n)
        if n % 4 == 0 and n < 60:
            prompt = list(range(n % 8, n % 8 + 10)) + [500 + n] * (n % 5 + 1)
            engine.handle(AddRequest(f"r{n}", prompt, SamplingParams(max_tokens=9), n, now), now)
        if n % 13 == 5:
            engine.handle(CancelRequest(f"r{n - n % 4}"), now)
        for message in engine.launch(now):
            if isinstance(message, Report):
                num_reports += 1
                kv = message.kv
                num_limbo += sum(b.fence >= 0 and b.hash is not None for p in engine.scheduler.pools for b in p.blocks)
                counts = {"u": kv.used, "s": kv.shared, "f": kv.filling, "c": kv.cached, ".": kv.free}
                assert min(counts.values()) >= 0
                assert sum(counts.values()) == kv.num_blocks == 47
                assert decode_cells(kv) == +Counter(counts)
        if engine.scheduler.num_submitted:
            engine.complete(engine.executor.collect(), now)
    assert num_reports > 40
    assert (num_limbo > 0) == (depth == 2)


def test_a_large_pool_is_drawn_coarsely() -> None:
    """At most MAX_CELLS cells; each shows the most telling state of its blocks."""
    engine = make_engine(5000, 1)
    engine.handle(Watch(1e9), 0.0)
    engine.handle(AddRequest("a", list(range(30)), SamplingParams(), 0, 0.0), 0.0)
    report = next(m for m in engine.launch(0.0) if isinstance(m, Report))
    kv = report.kv
    assert kv.blocks_per_cell == 4
    assert kv.num_cells == -(-4999 // 4) <= MAX_CELLS
    assert decode_cells(kv) == {"f": 2, ".": kv.num_cells - 2}


def test_reports_come_a_few_times_a_second_and_stop_when_nothing_changes() -> None:
    engine = make_engine(48, 1)
    engine.handle(AddRequest("a", [1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True), 0, 0.0), 0.0)
    times = []
    reports = []
    for n in range(200):
        now = n * 0.05
        found = [m for m in engine.launch(now) if isinstance(m, Report)]
        times += [now] * len(found)
        reports += found
        if engine.scheduler.num_submitted:
            engine.complete(engine.executor.collect(), now)
    assert all(later - earlier >= MIN_INTERVAL_S - 1e-9 for earlier, later in pairwise(times))
    assert times[-1] < 40 * 0.05 + 2 * MIN_INTERVAL_S, "an idle engine nobody watches is silent"
    assert all(not report.requests and not report.kv.cells for report in reports)
    last = reports[-1]
    assert (last.num_running, last.num_waiting) == (0, 0)
    assert (last.num_steps_total, last.generation_tokens_total, last.prompt_tokens_total) == (40, 40, 3)
    assert sum(token for report in reports for token in report.iteration_tokens) == 3 + 39


def test_a_watcher_gets_records_until_its_time_is_over() -> None:
    engine = make_engine(64, 1)
    for n in range(9):
        engine.handle(AddRequest(f"r{n}", [n, n], SamplingParams(max_tokens=30, ignore_eos=True), 0, 0.0), 0.0)
    engine.handle(Watch(until_s=2.0, interval_s=0.1), 0.0)
    with_records = []
    for n in range(40):
        now = n * 0.1
        for message in engine.launch(now):
            if isinstance(message, Report) and message.requests:
                with_records.append(now)
                assert len(message.requests) == message.num_running + message.num_waiting == 9
                assert message.waiting_by_reason == {"slots": 3}
                assert {r.state for r in message.requests} <= {"prefill", "decode", "waiting"}
        engine.complete(engine.executor.collect(), now)
        if not engine.scheduler.has_work:
            break
    assert with_records
    assert max(with_records) <= 2.0 + 1e-9


def test_what_an_engine_has_beside_its_scheduler_says_so_itself() -> None:
    engine = make_engine(64, 1)
    moving = [HandOffs(num_sent=1, num_sending=1)]
    engine.reporter.name, engine.reporter.role = "p0", "prefill"
    engine.reporter.handoffs = lambda: moving[0]
    engine.reporter.links = lambda: [LinkReport("d0", "shm", 7)]
    tiers = [TierReport("host", 9, 3)]
    engine.reporter.tiers = lambda: list(tiers)
    first = engine.reporter.due(0.0)
    assert first is not None
    assert (first.name, first.role, first.links[0].num_bytes, first.tiers[0].used_blocks) == ("p0", "prefill", 7, 3)
    assert engine.reporter.due(0.1) is None, "too early"
    again = engine.reporter.due(0.5)
    assert again is not None and again.handoffs == moving[0], "while something is in flight, reports go on"
    moving[0] = HandOffs(num_sent=1)
    last = engine.reporter.due(1.0)
    assert last is not None and last.handoffs is not None and last.handoffs.num_sending == 0
    assert engine.reporter.due(2.0) is None, "then an idle engine is silent"
    tiers[0] = TierReport("host", 9, 4)  # the pool has told it
    changed = engine.reporter.due(3.0)
    assert changed is not None and changed.tiers == tiers
    assert engine.reporter.due(4.0) is None
