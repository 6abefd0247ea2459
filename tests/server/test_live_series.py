"""The ring behind the charts: exact percentiles, windows, rates."""

from __future__ import annotations

import numpy as np
import pytest
from tests.server import page_schema
from tests.server.synthetic_messages import report

from penstock.server.live_series import COLUMNS, NUM_ROWS, Recent, Series, Totals, quantiles


def test_quantiles_are_exact_nearest_ranks() -> None:
    rng = np.random.default_rng(1)
    for size in (1, 2, 3, 19, 20, 100, 1001):
        values = rng.random(size).astype(np.float32)
        ordered = np.sort(values)
        found = quantiles(values.copy())
        for share, value in zip((0.5, 0.95, 0.99), found, strict=True):
            # The smallest value that at least this share of the samples does not exceed.
            rank = next(k for k in range(size) if (k + 1) / size >= share)
            assert value == pytest.approx(float(ordered[rank]), abs=1e-6)
    assert quantiles(np.empty(0, np.float32)) == [None, None, None]


def test_samples_leave_the_window() -> None:
    recent = Recent(1.0)  # two ticks
    recent.new.append(5.0)
    assert recent.tick() == [5.0, 5.0, 5.0]
    assert recent.tick() == [5.0, 5.0, 5.0]
    assert recent.tick() == [None, None, None]


def test_rates_over_a_window_and_after_a_restart() -> None:
    totals = Totals(9.0)
    assert totals.rate(2.0, 0) is None
    for k in range(10):
        totals.tick(0.5 * k, (100 * k, k))
    assert totals.rate(2.0, 0) == 200.0
    assert totals.rate(9.0, 0) == 100.0  # nothing was there before the first tick
    assert totals.difference(1.0) == (1.0, (200, 2))
    totals.tick(5.0, (7, 0))  # the engine was started anew
    assert totals.rate(2.0, 0) is None
    totals.tick(5.5, (57, 0))
    assert totals.rate(2.0, 0) == 25.0


def test_series_keeps_four_minutes_of_every_column() -> None:
    series = Series(-0.5)
    for k in range(NUM_ROWS + 5):
        series.tick(0.5 * k, 1000 + 0.5 * k, None)
    columns = series.columns()
    assert tuple(columns) == COLUMNS == page_schema.SERIES_COLUMNS
    assert {len(column) for column in columns.values()} == {NUM_ROWS}
    assert columns["ts"][-1] == 1000 + 0.5 * (NUM_ROWS + 4)
    assert set(columns["num_requests_running"]) == {None}
    assert columns["generation_tokens_per_s"][-1] == 0  # counted, and there were none


def test_first_prompt_counts_although_no_report_came_before_it() -> None:
    series = Series(-0.5)
    series.tick(0.0, 0.0, None)
    series.tick(0.5, 0.5, report(0.5, prompt=90, cached=30))
    assert series.row is not None and series.row["prompt_tokens_per_s"] == 10
    sources = series.by_source()
    assert (sources["device"], sources["compute"], sources["host"]) == (30, 60, None)
