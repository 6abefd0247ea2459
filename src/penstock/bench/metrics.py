"""Figures of a serving benchmark, under vLLM's labels and JSON keys, from the outcomes of its requests.

TTFT: from sending a request to its first text. ITL: gaps between events with text. TPOT: the time after the first text
over the tokens after the first. E2EL: from sending to the last event. Failed requests are counted, and in no other
figure. Knows outcomes; does not know how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.bench.openai_stream import Outcome
from penstock.config.values import ConfigError

# key in the JSON -> (name in labels, heading), in the order of the printed block
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}
SLO_METRICS = ("ttft", "tpot", "e2el")
DETAIL_KEYS = (
    "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times",
    "generated_texts", "errors",
)  # fmt: skip
WIDTH = 50  # of the printed block


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median, standard deviation and chosen percentiles of one metric, in milliseconds."""

    mean_ms: float
    median_ms: float
    std_ms: float
    percentiles_ms: tuple[tuple[float, float], ...]  # (percentile, value)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run is summed up to. Throughputs per second of the whole run."""

    duration_s: float
    num_completed: int
    num_failed: int
    num_input: int  # tokens
    num_output: int  # tokens
    request_throughput: float
    request_goodput: float | None  # None: no service level objective was given
    output_throughput: float
    total_throughput: float
    peak_output_throughput: float  # most tokens in any second of the run
    peak_concurrent: int
    spreads: dict[str, Spread]


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """["ttft:300", "tpot:20"] as metric -> milliseconds. Raises ConfigError."""
    found = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            raise ConfigError(f"{pair!r} is not NAME:MILLISECONDS", "--goodput") from None
        if name not in SLO_METRICS or limit_ms < 0 or math.isnan(limit_ms):
            names = ", ".join(SLO_METRICS)
            raise ConfigError(f"{pair!r}: the name is one of {names}, the limit not negative", "--goodput")
        found[name] = limit_ms
    return found


def tpot_s(outcome: Outcome) -> float | None:
    """Seconds per token after the first; None for a single token."""
    if outcome.num_output < 2:
        return None
    return (outcome.latency_s - outcome.ttft_s) / (outcome.num_output - 1)


def figures(
    outcomes: Sequence[Outcome],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput_ms: Mapping[str, float] | None = None,
) -> Figures:
    """Sum up a run of `duration_s` seconds."""
    good = [outcome for outcome in outcomes if not outcome.error]
    num_input = sum(outcome.num_prompt for outcome in good)
    num_output = sum(outcome.num_output for outcome in good)
    queued = [outcome.start_s - outcome.asked_s for outcome in good]
    values = {
        "ttft": [outcome.ttft_s for outcome in good],
        "tpot": [value for outcome in good if (value := tpot_s(outcome)) is not None],
        "itl": [gap for outcome in good for gap in outcome.itls_s],
        "e2el": [outcome.latency_s for outcome in good],
        "client_queue_time": queued,
        "e2el_including_client_queue": [o.latency_s + wait_s for o, wait_s in zip(good, queued, strict=True)],
    }
    num_good = None if not goodput_ms else sum(1 for outcome in good if _meets(outcome, goodput_ms))
    return Figures(
        duration_s=duration_s,
        num_completed=len(good),
        num_failed=len(outcomes) - len(good),
        num_input=num_input,
        num_output=num_output,
        request_throughput=len(good) / duration_s,
        request_goodput=None if num_good is None else num_good / duration_s,
        output_throughput=num_output / duration_s,
        total_throughput=(num_input + num_output) / duration_s,
        peak_output_throughput=_peak_tokens(good),
        peak_concurrent=_peak_concurrent(good),
        spreads={name: _spread(each, percentiles) for name, each in values.items()},
    )


def _meets(outcome: Outcome, goodput_ms: Mapping[str, float]) -> bool:
    measured_s = {"ttft": outcome.ttft_s, "tpot": tpot_s(outcome) or 0.0, "e2el": outcome.latency_s}
    return all(1000 * measured_s[name] <= limit_ms for name, limit_ms in goodput_ms.items())


def _spread(seconds: Sequence[float], percentiles: Sequence[float]) -> Spread:
    array = 1000 * np.array(seconds or [0.0])
    return Spread(
        float(array.mean()),
        float(np.median(array)),
        float(array.std()),
        tuple((p, float(np.percentile(array, p))) for p in percentiles),
    )


def _peak_tokens(outcomes: Sequence[Outcome]) -> float:
    """Most output tokens in any second, counted from the first start. An event stands for the same share of its
    request's tokens as every other one: a client that reads late gets several at once."""
    if not outcomes:
        return 0.0
    begin_s = min(outcome.start_s for outcome in outcomes)
    times = np.array([t for outcome in outcomes for t in outcome.token_times_s])
    weights = np.array(
        [outcome.num_output / len(outcome.token_times_s) for outcome in outcomes for _ in outcome.token_times_s]
    )
    if len(times) == 0:
        return 0.0
    return float(np.bincount((times - begin_s).astype(np.int64), weights).max())


def _peak_concurrent(outcomes: Sequence[Outcome]) -> int:
    """Most requests in flight at one moment; one that ends as another starts has made room for it."""
    edges = [(outcome.start_s, 1) for outcome in outcomes] + [(outcome.end_s, -1) for outcome in outcomes]
    count = peak = 0
    for _, change in sorted(edges):
        count += change
        peak = max(peak, count)
    return peak


def percentile_word(percentile: float) -> str:
    """99.0 as "99", 99.9 as "99.9"."""
    return str(int(percentile)) if percentile == int(percentile) else str(percentile)


def block(
    result: Figures, selected: Sequence[str], *, max_concurrency: int | None = None, request_rate: float = math.inf
) -> str:
    """The printed result, label for label vLLM's: dashboards read it with grep."""
    rows: list[tuple[str, str]] = [
        ("Successful requests:", f"{result.num_completed:<10}"),
        ("Failed requests:", f"{result.num_failed:<10}"),
    ]
    if max_concurrency is not None:
        rows.append(("Maximum request concurrency:", f"{max_concurrency:<10}"))
    if not math.isinf(request_rate):
        rows.append(("Request rate configured (RPS):", f"{request_rate:<10.2f}"))
    rows += [
        ("Benchmark duration (s):", f"{result.duration_s:<10.2f}"),
        ("Total input tokens:", f"{result.num_input:<10}"),
        ("Total generated tokens:", f"{result.num_output:<10}"),
        ("Request throughput (req/s):", f"{result.request_throughput:<10.2f}"),
    ]
    if result.request_goodput is not None:
        rows.append(("Request goodput (req/s):", f"{result.request_goodput:<10.2f}"))
    rows += [
        ("Output token throughput (tok/s):", f"{result.output_throughput:<10.2f}"),
        ("Peak output token throughput (tok/s):", f"{result.peak_output_throughput:<10.2f}"),
        ("Peak concurrent requests:", f"{float(result.peak_concurrent):<10.2f}"),
        ("Total token throughput (tok/s):", f"{result.total_throughput:<10.2f}"),
    ]
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines += [f"{label:<40} {value}" for label, value in rows]
    for name in _shown(selected, max_concurrency, request_rate):
        label, heading = METRICS[name]
        spread = result.spreads[name]
        lines.append(heading.center(WIDTH, "-"))
        lines.append(f"{f'Mean {label} (ms):':<40} {spread.mean_ms:<10.2f}")
        lines.append(f"{f'Median {label} (ms):':<40} {spread.median_ms:<10.2f}")
        for percentile, value in spread.percentiles_ms:
            lines.append(f"{f'P{percentile_word(percentile)} {label} (ms):':<40} {value:<10.2f}")
    lines.append("=" * WIDTH)
    return "\n".join(lines)


def result_json(
    result: Figures,
    outcomes: Sequence[Outcome],
    selected: Sequence[str],
    *,
    max_concurrency: int | None = None,
    request_rate: float = math.inf,
) -> dict[str, Any]:
    """The figures under vLLM's keys, lists per request (DETAIL_KEYS) included."""
    data: dict[str, Any] = {
        "duration": result.duration_s,
        "completed": result.num_completed,
        "failed": result.num_failed,
        "total_input_tokens": result.num_input,
        "total_output_tokens": result.num_output,
        "request_throughput": result.request_throughput,
        "request_goodput": result.request_goodput,
        "output_throughput": result.output_throughput,
        "total_token_throughput": result.total_throughput,
        "input_lens": [outcome.num_prompt for outcome in outcomes],
        "output_lens": [0 if outcome.error else outcome.num_output for outcome in outcomes],
        "ttfts": [outcome.ttft_s for outcome in outcomes],
        "itls": [outcome.itls_s for outcome in outcomes],
        "latencies": [outcome.latency_s for outcome in outcomes],
        "start_times": [outcome.start_s for outcome in outcomes],
        "queue_times": [outcome.start_s - outcome.asked_s for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
        "max_output_tokens_per_s": result.peak_output_throughput,
        "max_concurrent_requests": result.peak_concurrent,
    }
    for name in _shown(selected, max_concurrency, request_rate):
        spread = result.spreads[name]
        data[f"mean_{name}_ms"] = spread.mean_ms
        data[f"median_{name}_ms"] = spread.median_ms
        data[f"std_{name}_ms"] = spread.std_ms
        for percentile, value in spread.percentiles_ms:
            data[f"p{percentile_word(percentile)}_{name}_ms"] = value
    return data


def _shown(selected: Sequence[str], max_concurrency: int | None, request_rate: float) -> list[str]:
    """Selected metrics in order; waiting in the client means something only where the client makes requests wait."""
    shown = [name for name in METRICS if name in selected]
    if max_concurrency is None:
        shown = [name for name in shown if name in ("ttft", "tpot", "itl", "e2el")]
    elif math.isinf(request_rate):
        shown = [name for name in shown if name != "e2el_including_client_queue"]
    return shown
