"""What a simulated run showed: times to the first token, reuse, imbalance, goodput; means with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.sim.fleet import Outcome, SimFleet

# Student's t, two-sided 95 %, by degrees of freedom; above the last, the normal's.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


@dataclass(frozen=True, slots=True)
class FleetReport:
    """Seconds unless said. `reuse`: cached prompt tokens / prompt tokens. `imbalance`: busiest engine / mean."""

    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    reuse: float
    imbalance: float
    goodput: float  # share of requests within the SLO
    prediction_error: float  # median of |predicted - true| / true over TTFTs above 0.1 s
    num_copies: int
    num_loaded_blocks: int


def report(fleet: SimFleet, outcomes: Sequence[Outcome], ttft_slo_s: float = 2.0) -> FleetReport:
    """Sum a run up."""
    ttft = np.array([outcome.ttft_s for outcome in outcomes])
    predicted = np.array([outcome.choice.predicted_ms / 1000 for outcome in outcomes])
    busy = np.array([engine.executor.busy_s for engine in fleet.engines.values()])
    long = ttft > 0.1
    p50, p95, p99 = map(float, np.percentile(ttft, (50, 95, 99)))
    return FleetReport(
        p50,
        p95,
        p99,
        float(ttft.mean()),
        sum(outcome.cached_tokens for outcome in outcomes) / sum(o.request.prompt_tokens for o in outcomes),
        float(busy.max() / busy.mean()),
        float((ttft <= ttft_slo_s).mean()),
        float(np.median(np.abs(predicted - ttft)[long] / ttft[long])) if long.any() else 0.0,
        fleet.num_copies,
        fleet.num_loaded_blocks,
    )


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student's t); infinite from one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    t = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96
    return mean, t * math.sqrt(variance / len(values))
