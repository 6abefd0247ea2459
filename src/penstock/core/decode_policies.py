"""Where to decode: by what engines have left. Policies of the same door as `route_policies`, with other columns."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from penstock.core.cost import FloatArray, IntArray
from penstock.core.doors import CostModel
from penstock.core.kv_index import KVIndex
from penstock.core.route_policies import HOT, NUM_RUNNER_UPS, Policy, within
from penstock.core.routing import BoolArray, Choice, EngineViews, RouteRequest


def decode_candidates(request: RouteRequest, engines: EngineViews) -> tuple[BoolArray, IntArray]:
    """(rows with a slot and memory left, without the hot ones; their KV in use). Where all are hot, hot ones may."""
    need = blocks_needed(request, engines)
    fits = engines.alive & (engines.num_running < engines.slots) & (engines.free_blocks >= need)
    used = engines.num_blocks - engines.free_blocks
    if not fits.any():
        return fits, used
    cool = fits & within(engines.num_running, engines.alive, HOT) & within(used, engines.alive, HOT)
    return (cool if cool.any() else fits), used


def blocks_needed(request: RouteRequest, engines: EngineViews) -> int:
    """Of the prompt and the answer that is expected."""
    return -(-(request.prompt_tokens + max(1, request.output_tokens)) // engines.block_size)


class DecodePolicy(Policy):
    """Picks by `ranks`; the reservation (`EngineViews.reserve`) is the caller's, at once."""

    def pick(self, request: RouteRequest, engines: EngineViews, index: KVIndex, now: float) -> Choice | None:
        allowed, used = decode_candidates(request, engines)
        if not allowed.any():
            return None
        ranks = self.ranks(request, engines, used, allowed)
        row = self.among(np.where(allowed, ranks, np.inf))
        others = sorted((float(ranks[r]), int(r)) for r in np.flatnonzero(allowed) if r != row)[:NUM_RUNNER_UPS]
        ups = tuple((engines.names[other], rank) for rank, other in others)
        return Choice(engines.names[row], row, 0.0, {"rank": float(ranks[row])}, ups, 0, 0, 0.0)

    def ranks(self, request: RouteRequest, engines: EngineViews, used: IntArray, allowed: BoolArray) -> FloatArray:
        """Per row, lower is better."""
        raise NotImplementedError


class RemainingSlotsPolicy(DecodePolicy):
    """Most left of what it has least of, slots or blocks after this request; then the fewest running.

    Source: Tencent's Angel-HCF schedules decodes by remaining slots first.
    """

    def ranks(self, request: RouteRequest, engines: EngineViews, used: IntArray, allowed: BoolArray) -> FloatArray:
        slots = np.maximum(engines.slots, 1)
        blocks = np.maximum(engines.num_blocks, 1)
        left = (engines.free_blocks - blocks_needed(request, engines)) / blocks
        scarce = np.minimum((engines.slots - engines.num_running) / slots, left)
        return np.asarray(-scarce + 1e-9 * engines.num_running)


@dataclass(slots=True)
class DecodeRoundRobinPolicy(DecodePolicy):
    """One after another."""

    turn: int = -1

    def ranks(self, request: RouteRequest, engines: EngineViews, used: IntArray, allowed: BoolArray) -> FloatArray:
        distance = (np.arange(len(allowed)) - self.turn - 1) % len(allowed)
        self.turn = int(np.where(allowed, distance, len(allowed)).argmin())
        return distance.astype(float)


class FewestRunningPolicy(DecodePolicy):
    """The fewest requests."""

    def ranks(self, request: RouteRequest, engines: EngineViews, used: IntArray, allowed: BoolArray) -> FloatArray:
        return engines.num_running.astype(float)


class LeastKVPolicy(DecodePolicy):
    """The least KV in use."""

    def ranks(self, request: RouteRequest, engines: EngineViews, used: IntArray, allowed: BoolArray) -> FloatArray:
        return used.astype(float)


class FlexLBDecodePolicy(DecodePolicy):
    """RTP-LLM's COST_BASED_DECODE: at random, weighted with exp(-0.001 * (tokens in use - least))."""

    def ranks(self, request: RouteRequest, engines: EngineViews, used: IntArray, allowed: BoolArray) -> FloatArray:
        tokens = used * float(engines.block_size)
        weights = np.where(allowed, np.exp(-0.001 * (tokens - tokens[allowed].min())), 0.0)
        ranks = np.ones(len(allowed))
        ranks[self.random.choices(range(len(allowed)), weights.tolist())[0]] = 0.0
        return ranks


DECODE_POLICIES: dict[str, type[DecodePolicy]] = {
    "remaining_slots": RemainingSlotsPolicy,
    "round_robin": DecodeRoundRobinPolicy,
    "request_count": FewestRunningPolicy,
    "kv_size": LeastKVPolicy,
    "flexlb": FlexLBDecodePolicy,
}


def decode_policy(name: str, cost: CostModel, seed: int = 0) -> DecodePolicy:
    """A policy by its name. Raises KeyError for an unknown one."""
    return DECODE_POLICIES[name](cost, random.Random(seed))
