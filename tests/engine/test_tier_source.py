"""What an engine reports of its tiers: what their pool said last, also while nothing is computed, until it is gone."""

from __future__ import annotations

from collections.abc import Sequence

from tests.engine.test_report import make_engine

from penstock.core.tier_client import TierClient
from penstock.core.tier_costs import PrefillRate
from penstock.core.tiering import HOST, ClientSettings, PoolStatus, TierStatus, ToEngine, ToPool, WantContents
from penstock.engine.messages import Report
from penstock.engine.tier_source import TierSource


class Line:
    """A pool that says what it is told to say."""

    def __init__(self) -> None:
        self.says: list[ToEngine] = []
        self.is_gone = False

    def send(self, message: ToPool | WantContents, now: float) -> None:
        assert not self.is_gone

    def receive(self, now: float) -> Sequence[ToEngine]:
        said, self.says = self.says, []
        return said

    def is_lost(self, now: float) -> bool:
        return self.is_gone


def test_an_idle_engine_reports_what_its_pool_says() -> None:
    engine, line = make_engine(64, 1), Line()
    client = TierClient(engine.scheduler.layout, ClientSettings(), PrefillRate(1e-3, 1e-7))
    source = TierSource(engine.scheduler, client, line)
    engine.reporter.tiers = source.reports

    def told(now: float) -> list[tuple[str, int, str]] | None:
        source.turn(now)
        report: Report | None = engine.reporter.due(now)
        return None if report is None else [(tier.name, tier.used_blocks, tier.state) for tier in report.tiers]

    assert told(0.0) == []  # it has begun, and the pool has not spoken yet
    line.says = [PoolStatus((TierStatus(HOST, 8, 0, "on"), TierStatus("disk", 9, 2, "on")))]
    assert told(1.0) == [(HOST, 0, "on"), ("disk", 2, "on")]
    assert told(2.0) is None
    line.says = [PoolStatus((TierStatus(HOST, 8, 3, "on"), TierStatus("disk", 9, 2, "off: no space")))]
    assert told(3.0) == [(HOST, 3, "on"), ("disk", 2, "off: no space")]
    line.is_gone = True
    assert told(4.0) == [(HOST, 0, "off: the pool is gone"), ("disk", 0, "off: the pool is gone")]
    assert told(5.0) is None
