"""The last four minutes of one engine in numbers: a ring of rows for the page's charts, two rows a second.

Knows events (a request came, tokens left) and the engine's running totals; turns them into rates and exact
percentiles. Knows no HTTP, no clock (every call is told the time) and no wall time: `ts` is the caller's business.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.engine.messages import Report

INTERVAL_S = 0.5  # between rows
NUM_ROWS = 480  # 240 s
PROMPT_WINDOW_S = 9.0  # prompts are admitted in lumps; a short window would show needles
OUTPUT_WINDOW_S = 2.0
LATENCY_WINDOW_S = 20.0
SOURCE_WINDOW_S = 60.0
MAX_GAPS = 65_536  # latency samples kept: 20 s at 3,200 tokens a second; above that, the newest ones

Row = dict[str, float | int | None]
TIERS = ("host", "disk", "remote")
SOURCES = ("device", "peer", *TIERS, "compute")  # of a prompt token's KV
QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
COLUMNS = (
    "ts",
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens_per_s",
    "prompt_tokens_cached_per_s",
    "generation_tokens_per_s",
    *(f"time_to_first_token_seconds_{name}" for _, name in QUANTILES),
    *(f"inter_token_latency_seconds_{name}" for _, name in QUANTILES),
)


def quantiles(values: npt.NDArray[np.float32]) -> list[float | None]:
    """p50, p95 and p99 by nearest rank, exact; None for each where there are no values. `values` is reordered."""
    if not values.size:
        return [None] * len(QUANTILES)
    ranks = [max(0, math.ceil(share * values.size) - 1) for share, _ in QUANTILES]
    values.partition(ranks)
    return [round(float(values[rank]), 6) for rank in ranks]


class Recent:
    """Samples of the last `window_s`, kept by tick: an append in the hot path, one array per tick afterwards."""

    def __init__(self, window_s: float) -> None:
        self.new: list[float] = []
        self._ticks: deque[npt.NDArray[np.float32]] = deque(maxlen=round(window_s / INTERVAL_S))

    def tick(self) -> list[float | None]:
        """Close the tick and return the quantiles of the window."""
        self._ticks.append(np.asarray(self.new[-MAX_GAPS:], dtype=np.float32))
        self.new.clear()
        return quantiles(np.concatenate(self._ticks)[-MAX_GAPS:])


class Totals:
    """A few counters that only rise, remembered at each tick, so that any window's difference can be asked for."""

    def __init__(self, window_s: float) -> None:
        self._ticks: deque[tuple[float, tuple[int, ...]]] = deque(maxlen=round(window_s / INTERVAL_S) + 1)

    def tick(self, now: float, totals: tuple[int, ...]) -> None:
        """Remember `totals` as of `now`. Counters that fell belong to an engine started anew: begin again."""
        if self._ticks and any(new < old for new, old in zip(totals, self._ticks[-1][1], strict=True)):
            self._ticks.clear()
        self._ticks.append((now, totals))

    def difference(self, window_s: float) -> tuple[float, tuple[int, ...]] | None:
        """(seconds, increase of each counter) over the last `window_s`, or as far back as there are ticks."""
        if len(self._ticks) < 2:
            return None
        back = min(len(self._ticks) - 1, round(window_s / INTERVAL_S))
        (start, first), (end, last) = self._ticks[-1 - back], self._ticks[-1]
        return end - start, tuple(b - a for a, b in zip(first, last, strict=True))

    def rate(self, window_s: float, index: int) -> float | None:
        """Increase per second of one counter over the whole window, None before the second tick.

        Where the ticks do not reach back so far, there was nothing before them.
        """
        found = self.difference(window_s)
        return None if found is None else round(found[1][index] / max(found[0], window_s), 3)


def source_totals(report: Report | None) -> tuple[int, ...]:
    """Prompt tokens by SOURCES since start. What a peer sent counts as peer where its cache or tiers had it, and as
    computed where they did not; of tiers, as many tokens as the blocks have that engines took for their own requests.
    """
    if report is None:
        return (0,) * len(SOURCES)  # before its first report an engine has admitted nothing
    told, known = report.handoffs, report.prompt_tokens_by_source
    received, cached = (0, 0) if told is None else (told.tokens_received, told.tokens_received_cached)
    tiers = dict.fromkeys(TIERS, 0)
    for engine in report.engines or [report]:
        for tier in engine.tiers if engine.role != "prefill" else ():
            tiers[tier.name] = tiers.get(tier.name, 0) + tier.hit_blocks * engine.kv.block_size
    computed = known.get("compute", 0) + received - cached
    return (known.get("device", 0), cached, *(tiers[name] for name in TIERS), computed)


def hands_over(report: Report) -> bool:
    """Are there engines that compute prompts for others?"""
    told = report.handoffs
    return told is not None and (told.num_received > 0 or any(each.role == "prefill" for each in report.engines))


def existing_sources(report: Report | None) -> frozenset[str]:
    """Those of SOURCES that there are."""
    found = {"device", "compute"}
    if report is not None:
        found |= {"peer"} if hands_over(report) else set()
        found |= {tier.name for engine in report.engines or [report] for tier in engine.tiers}
    return frozenset(found)


class Series:
    """The ring, from `now` on. `gaps.new` and `first_tokens.new` are appended to by whoever sees tokens leave."""

    def __init__(self, now: float) -> None:
        self.first_tokens = Recent(LATENCY_WINDOW_S)
        self.gaps = Recent(LATENCY_WINDOW_S)
        self.num_generated = 0  # tokens handed out since start
        self.prompts = Totals(PROMPT_WINDOW_S)  # prompt tokens admitted, of these not computed anywhere
        self.sources = Totals(SOURCE_WINDOW_S)
        self._existing = existing_sources(None)
        self.outputs = Totals(OUTPUT_WINDOW_S)
        self._columns: dict[str, deque[float | int | None]] = {name: deque(maxlen=NUM_ROWS) for name in COLUMNS}
        self.row: Row | None = None
        self.prompts.tick(now, (0, 0))
        self.sources.tick(now, source_totals(None))
        self.outputs.tick(now, (0,))

    def tick(self, now: float, ts: float, report: Report | None) -> Row:
        """Close one interval at `now` (engine's clock; `ts` is the same moment on the wall) and return its row."""
        self.outputs.tick(now, (self.num_generated,))
        sources = source_totals(report)
        self.sources.tick(now, sources)
        self._existing = existing_sources(report)
        self.prompts.tick(now, (0 if report is None else report.prompt_tokens_total, sum(sources[:-1])))
        values: Sequence[float | int | None] = (
            round(ts, 3),
            None if report is None else report.num_running,
            None if report is None else report.num_waiting,
            self.prompts.rate(PROMPT_WINDOW_S, 0),
            self.prompts.rate(PROMPT_WINDOW_S, 1),
            self.outputs.rate(OUTPUT_WINDOW_S, 0),
            *self.first_tokens.tick(),
            *self.gaps.tick(),
        )
        self.row = dict(zip(COLUMNS, values, strict=True))
        for name, value in self.row.items():
            self._columns[name].append(value)
        return self.row

    def columns(self) -> dict[str, list[float | int | None]]:
        """All rows that are kept, oldest first, column by column."""
        return {name: list(column) for name, column in self._columns.items()}

    def by_source(self) -> dict[str, float | int | None]:
        """Prompt tokens of the last 60 s (or since start) by where their KV came from; None: there is no such place."""
        found = self.sources.difference(SOURCE_WINDOW_S)
        if found is None:
            return {"window_s": None, **dict.fromkeys(SOURCES)}
        numbers = zip(SOURCES, found[1], strict=True)
        known = {name: number if name in self._existing else None for name, number in numbers}
        return {"window_s": round(found[0], 3), **known}
