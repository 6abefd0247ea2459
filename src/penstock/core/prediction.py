"""How long a request would take on each engine: waiting, loads from tiers, and the prompt's computation.

Pure. Knows columns of engines, hits and a cost model; decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from penstock.core.cost import FloatArray, IntArray
from penstock.core.doors import CostModel
from penstock.core.kv_index import KVIndex
from penstock.core.moves import DEVICE
from penstock.core.routing import EngineViews, RouteRequest

DISTRUST = 0.8  # hits that came true less often than this are counted as far as they did; above it, luck
MANY = 16  # rows: more are computed as arrays


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one request on every row: seconds, and tokens by where they come from."""

    wait_s: FloatArray
    load_s: FloatArray
    prefill_s: FloatArray
    device_tokens: IntArray
    hit_tokens: IntArray  # in the device or worth loading
    new_tokens: IntArray

    @property
    def total_s(self) -> FloatArray:
        """Until the prompt is computed. Loads run while the request waits, so the longer of the two counts."""
        return np.maximum(self.wait_s, self.load_s) + self.prefill_s


def predict(
    request: RouteRequest, engines: EngineViews, index: KVIndex, cost: CostModel, now: float, *, tiers: bool = True
) -> Prediction:
    """Wait, loads and prefill of a request on every engine. `tiers`: whether what is not in the device counts.

    What other tiers hold is loaded or computed, whichever is sooner. Hits count as far as they came true so far.
    """
    size, prompt = engines.block_size, request.prompt_tokens
    match = index.match(request.hashes)
    blocks = match.blocks
    longest = max(prompt - 1, 0)
    device = _believed(blocks[DEVICE], engines.trust, size, longest)
    prefill_s = prefill_after(device, prompt, cost)
    load_s, hit = np.zeros(len(device)), device
    if tiers and len(blocks) > 1:
        for tier, counts in blocks.items():
            if tier != DEVICE:
                load_s += load_seconds(counts, engines.block_bytes, tier, cost)
        with_loads = _believed(match.total, engines.trust, size, longest)
        sooner = prefill_after(with_loads, prompt, cost)
        pays = sooner + load_s < prefill_s
        prefill_s, load_s = np.where(pays, sooner, prefill_s), np.where(pays, load_s, 0.0)
        hit = np.where(pays, with_loads, device)
    return Prediction(engines.wait_s(now), load_s, prefill_s * engines.slowness, device, hit, prompt - hit)


def _believed(blocks: IntArray, trust: FloatArray, block_size: int, longest: int) -> IntArray:
    """Tokens of a hit, as far as hits came true so far."""
    tokens = np.minimum(blocks * block_size, longest)
    doubted = trust < DISTRUST
    if doubted.any():
        tokens[doubted] = (tokens[doubted] * trust[doubted]).astype(np.int64)
    return tokens


def prefill_after(hits: IntArray, prompt_tokens: int, cost: CostModel) -> FloatArray:
    """Seconds to compute a prompt after hits of so many tokens, per row. Most rows of a large fleet are alike."""
    least = int(hits.min())
    seconds = np.full(len(hits), cost.prefill_seconds(prompt_tokens - least, least))
    (more,) = (hits > least).nonzero()
    if len(more) > MANY:
        seconds[more] = cost.prefill_seconds_each(prompt_tokens - hits[more], hits[more])
    else:
        for row in more.tolist():
            hit = int(hits[row])
            seconds[row] = cost.prefill_seconds(prompt_tokens - hit, hit)
    return seconds


def load_seconds(counts: IntArray, block_bytes: int, tier: str, cost: CostModel, *, nothing: float = 0.0) -> FloatArray:
    """Of loading so many blocks, per row; `nothing` for none. Moves are affine in bytes, so two of them tell all."""
    most = int(counts.max())
    if not most:
        return np.full(len(counts), nothing)
    one, all_ = cost.move_seconds(block_bytes, tier), cost.move_seconds(most * block_bytes, tier)
    if math.isinf(all_):
        return np.where(counts > 0, np.inf, nothing)
    each = (all_ - one) / (most - 1) if most > 1 else 0.0
    return np.where(counts > 0, (one - each) + counts * each, nothing)
