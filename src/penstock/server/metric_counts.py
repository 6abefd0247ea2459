"""What is counted of one engine for its metrics: histograms of its requests, and the totals that its reports carry.

Names, meanings and bucket boundaries are those of vLLM's V1 engine (vllm/v1/metrics/loggers.py and stats.py). Plain
integers and `bisect`: prometheus-client's `observe` costs several microseconds. Knows reports; knows no text format.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.utils import floatToGoString

from penstock.core.request import FINISH_ABORT, FINISH_ERROR, FINISH_LENGTH, FINISH_STOP
from penstock.engine.messages import Report

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_TIME_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_TIME_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PARAMS_N_BUCKETS = (1, 2, 5, 10, 20)

Key = tuple[str, ...]  # name of a total, then what tells it from others of that name: a peer, a tier
LINK_TOTALS = ("bytes", "messages", "transfers", "failed_transfers", "busy_seconds", "exposed_seconds")
TIER_TOTALS = ("hit_blocks", "read_bytes", "written_bytes", "load_seconds")
HANDOFF_TOTALS = ("sent", "received", "failed", "local", "tokens_received", "tokens_received_cached")


def one_two_five(limit: int) -> tuple[int, ...]:
    """vLLM's buckets for token counts: 1, 2, 5, 10, 20, 50 ... as far as `limit`.

    >>> one_two_five(100)
    (1, 2, 5, 10, 20, 50, 100)
    """
    buckets: list[int] = []
    power = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * power > limit:
                return tuple(buckets)
            buckets.append(mantissa * power)
        power *= 10


class Histogram:
    """Counts per bucket, not cumulative, and the sum. An observation costs about 0.2 us."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count `value`; a value on a boundary belongs to the bucket that ends there (`le`)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it) pairs, the last one +Inf."""
        names = [floatToGoString(bound) for bound in (*self.bounds, float("inf"))]  # type: ignore[no-untyped-call]
        return list(zip(names, accumulate(self.counts), strict=True))


class EngineCounts:
    """One engine. `labels` tell it from others; `bounds` are the buckets of token counts. One thread calls all."""

    def __init__(self, labels: dict[str, str], bounds: Sequence[int]) -> None:
        self.labels = labels
        self.report: Report | None = None
        self.totals: dict[Key, float] = {}  # that Reports carry, summed over restarts of the engine
        self._told: dict[Key, float] = {}
        self.generation_tokens = 0
        self.success = dict.fromkeys((FINISH_STOP, FINISH_LENGTH, FINISH_ABORT, FINISH_ERROR), 0)
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(TOKEN_TIME_BUCKETS)
        self.tpot = Histogram(TOKEN_TIME_BUCKETS)
        self.e2e = Histogram(REQUEST_TIME_BUCKETS)
        self.queue = Histogram(REQUEST_TIME_BUCKETS)
        self.prefill = Histogram(REQUEST_TIME_BUCKETS)
        self.decode = Histogram(REQUEST_TIME_BUCKETS)
        self.inference = Histogram(REQUEST_TIME_BUCKETS)
        self.iteration_tokens = Histogram(ITERATION_BUCKETS)
        self.params_n = Histogram(PARAMS_N_BUCKETS)
        self.prompt_tokens = Histogram(bounds)
        self.output_tokens = Histogram(bounds)
        self.params_max_tokens = Histogram(bounds)
        self.computed_tokens = Histogram(bounds)

    def take(self, report: Report) -> None:
        """The engine's newest report. Its `iteration_tokens` are the caller's to count: once."""
        self.report = report
        for key, value in _totals(report):
            # An engine that was started anew counts from 0 again; a Prometheus counter may never fall.
            before = self._told.get(key, 0)
            self.totals[key] = self.totals.get(key, 0) + (value - before if value >= before else value)
            self._told[key] = value

    def total(self, *key: str) -> float:
        return self.totals.get(key, 0)


def _totals(report: Report) -> Iterator[tuple[Key, float]]:
    yield ("prompt_tokens",), report.prompt_tokens_total
    for source, number in report.prompt_tokens_by_source.items():
        yield ("source", source), number
    yield ("prefill_tokens",), report.prefill_tokens_total
    yield ("num_preemptions",), report.num_preemptions_total
    yield ("prefix_cache_queries",), report.prefix_queries_total
    yield ("prefix_cache_hits",), report.prefix_hits_total
    told = report.handoffs
    if told is not None:
        numbers = (told.num_sent, told.num_received, told.num_failed, told.num_local)
        tokens = (told.tokens_received, told.tokens_received_cached)
        for name, number in zip(HANDOFF_TOTALS, (*numbers, *tokens), strict=True):
            yield ("handoffs", name), number
    for link in report.links:
        sizes = (link.num_bytes, link.num_messages, link.num_transfers, link.num_failed)
        for name, value in zip(LINK_TOTALS, (*sizes, link.busy_s, link.exposed_s), strict=True):
            yield ("link", name, link.peer, link.scheme), value
    for tier in report.tiers:
        values = (tier.hit_blocks, tier.read_bytes, tier.written_bytes, tier.load_s)
        for name, value in zip(TIER_TOTALS, values, strict=True):
            yield ("tier", name, tier.name), value
