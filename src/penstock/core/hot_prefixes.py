"""Prefixes in such demand that one engine cannot serve them: when to copy them, and to whom.

Source: Preble (Srivatsa et al. 2024) replicates by recomputing; a copy costs a twentieth of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from penstock.core.doors import CostModel
from penstock.core.prediction import Prediction
from penstock.core.routing import BoolArray, EngineViews, Replicate, RouteRequest

SHARE = 0.6  # of one engine's time
WINDOW_S = 60.0  # demand is a mean over it; a copy that is no longer wanted is left to age out of its cache
COPY_AGAIN_S = 1.0  # a copy needs time until the index knows of it
MAX_TRACKED = 10_000


@dataclass(slots=True)
class _Demand:
    per_s: float  # requests
    seen_s: float
    copied_s: float = float("-inf")


@dataclass(slots=True)
class HotPrefixes:
    """Demand of a prefix: requests a second times the time to compute it, in engines.

    Looked at where a prompt is 1, 2, 4, 8, ... blocks long, as far as it has been seen, and one further. Above 60 % of
    one engine, ceil(demand / 60 %) engines should hold it.
    """

    share: float = SHARE
    _demands: dict[bytes, _Demand] = field(default_factory=dict)

    def copies(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, cost: CostModel,
        now: float,
    ) -> tuple[Replicate, ...]:  # fmt: skip
        """Count a request; the copy that should be made now, if one should: of the longest prefix that is hot."""
        hot: tuple[int, float, _Demand] | None = None
        depth = 1
        is_known = True
        while is_known and depth <= len(request.hashes):
            is_known = request.hashes[depth - 1] in self._demands
            demand = self._count(request.hashes[depth - 1], now)
            if demand.per_s * WINDOW_S >= 2:
                engines_wanted = demand.per_s * cost.prefill_seconds(depth * engines.block_size, 0)
                if engines_wanted > self.share:
                    hot = depth, engines_wanted, demand
            depth *= 2
        if hot is None or now < hot[2].copied_s + COPY_AGAIN_S:
            return ()
        depth, engines_wanted, demand = hot
        holds = allowed & (predicted.device_tokens >= depth * engines.block_size)
        lacks = allowed & ~holds
        if not holds.any() or not lacks.any() or holds.sum() >= math.ceil(engines_wanted / self.share):
            return ()
        demand.copied_s = now
        src = int(np.where(holds, predicted.wait_s, np.inf).argmin())
        dst = int(np.where(lacks, predicted.wait_s, np.inf).argmin())
        return (Replicate(tuple(request.hashes[:depth]), engines.names[src], engines.names[dst]),)

    def _count(self, hash_: bytes, now: float) -> _Demand:
        demand = self._demands.get(hash_)
        if demand is None:
            if len(self._demands) >= MAX_TRACKED:
                self._demands = {h: d for h, d in self._demands.items() if now - d.seen_s < WINDOW_S}
            if len(self._demands) >= MAX_TRACKED:
                self._demands.clear()
            demand = self._demands[hash_] = _Demand(1 / WINDOW_S, now)
        else:
            demand.per_s = demand.per_s * math.exp((demand.seen_s - now) / WINDOW_S) + 1 / WINDOW_S
            demand.seen_s = now
        return demand
