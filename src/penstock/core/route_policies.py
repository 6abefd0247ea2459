"""Ours, which chooses an engine by predicted time, and the policies of other routers behind the same door.

Each is a small object with a seeded generator. Knows columns of engines and the index; sends nothing.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, field

import numpy as np

from penstock.core.cost import FloatArray, IntArray
from penstock.core.doors import CostModel
from penstock.core.hot_prefixes import HotPrefixes
from penstock.core.kv_index import KVIndex
from penstock.core.prediction import Prediction, load_seconds, predict, prefill_after
from penstock.core.routing import BoolArray, Choice, EngineViews, Replicate, RouteRequest

TIE_SHARE, TIE_S = 0.10, 0.020  # scores within the larger of the two are equal
HOT = 3.0  # times the mean
SLO_MARGIN_S = 0.1
NUM_RUNNER_UPS = 3
PEER = "peer"  # of the cost model: a copy between engines
MAX_SOURCES = 64  # engines with the longest hits that others may copy from; of 1,000, all would cost 7 ms a decision


def candidates(request: RouteRequest, engines: EngineViews) -> BoolArray:
    """Rows that may be chosen at all: alive, and large enough for the prompt."""
    need = -(-(request.prompt_tokens + 1) // engines.block_size)
    return engines.alive & (engines.num_blocks >= need)


def chosen(
    row: int, scores: FloatArray, allowed: BoolArray, engines: EngineViews, predicted: Prediction,
    copies: tuple[Replicate, ...] = (), *, unit: float = 1.0,
) -> Choice:  # fmt: skip
    """The decision in full. `scores`: lower is better, in the policy's own unit; runner-ups' are told times `unit`."""
    left = np.where(allowed, scores, np.inf)
    left[row] = np.inf
    ranked = []
    for _ in range(NUM_RUNNER_UPS):
        other = int(left.argmin())
        score = left.item(other)
        if math.isinf(score):
            break
        ranked.append((engines.names[other], unit * score))
        left[other] = np.inf
    wait, load, prefill = predicted.wait_s.item(row), predicted.load_s.item(row), predicted.prefill_s.item(row)
    terms = {"wait": 1e3 * wait, "load": 1e3 * max(0.0, load - wait), "prefill": 1e3 * prefill}
    return Choice(
        engines.names[row], row, sum(terms.values()), terms,
        tuple(ranked),
        predicted.hit_tokens.item(row), predicted.new_tokens.item(row), prefill, copies,
    )  # fmt: skip


@dataclass(slots=True)
class Policy:
    """What all of them need. `tiers`: does it count on what lies outside the device?"""

    cost: CostModel
    random: random.Random
    tiers: bool = True

    def pick(self, request: RouteRequest, engines: EngineViews, index: KVIndex, now: float) -> Choice | None:
        """Where to send a request; None when no engine can take it. Changes nothing but the policy's own counters."""
        allowed = candidates(request, engines)
        if not allowed.any():
            return None
        predicted = predict(request, engines, index, self.cost, now, tiers=self.tiers)
        scores = self.scores(request, engines, predicted, allowed, now)
        row = self.among(np.where(allowed, scores, np.inf))
        return chosen(row, scores, allowed, engines, predicted)

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        """Per row, lower is better. Rows that are not allowed may have any."""
        raise NotImplementedError

    def among(self, scores: FloatArray) -> int:
        """One of the best, at random."""
        return self.one_of(np.flatnonzero(scores == scores.min()))

    def one_of(self, found: IntArray) -> int:
        """One of these row numbers, at random."""
        return int(found[0] if len(found) == 1 else found[self.random.randrange(len(found))])


def near_best(scores: FloatArray, seconds: FloatArray, tail_s: float = 0.0) -> IntArray:
    """Which rows are nearly best: two routers, or two decisions on stale news, then do not all run to the same engine.

    A share of the best's time counts as nothing: of its `seconds` and what comes after them.
    """
    at = int(scores.argmin())
    (near,) = (scores <= scores.item(at) + max(TIE_SHARE * (seconds.item(at) + tail_s), TIE_S)).nonzero()
    return near


def mean_of(amounts: np.ndarray, allowed: BoolArray) -> float:
    """Over the rows that are allowed; there is one."""
    return float(amounts @ allowed) / int(np.count_nonzero(allowed))


class RandomPolicy(Policy):
    """Any engine."""

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        return np.zeros(len(allowed))


@dataclass(slots=True)
class RoundRobinPolicy(Policy):
    """One after another."""

    turn: int = -1

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        distance = (np.arange(len(allowed)) - self.turn - 1) % len(allowed)
        self.turn = int(np.where(allowed, distance, len(allowed)).argmin())
        return distance.astype(float)


class LeastLoadedPolicy(Policy):
    """The shortest predicted wait; caches do not count."""

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        return predicted.wait_s


class FewestRequestsPolicy(Policy):
    """The fewest prompts that are not done."""

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        return engines.num_requests.astype(float)


@dataclass(slots=True)
class ConsistentHashPolicy(Policy):
    """Rendezvous hashing of the prompt's first `depth` blocks, with bounded load: nobody gets above 1.25 of the mean.

    Source: Thaler & Ravishankar 1998; Mirrokni et al. 2016, "Consistent Hashing with Bounded Loads".
    """

    depth: int = 2
    bound: float = 1.25

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        key = request.hashes[min(self.depth, len(request.hashes)) - 1] if request.hashes else request.id.encode()
        weights = np.ones(len(allowed))
        for row in np.flatnonzero(allowed).tolist():
            digest = hashlib.blake2b(key + engines.names[row].encode(), digest_size=8).digest()
            weights[row] = int.from_bytes(digest, "little") / 2**64
        limit = self.bound * (int(engines.num_requests[allowed].sum()) + 1) / int(allowed.sum())
        return weights + np.where(engines.num_requests + 1 > max(limit, 1.0), 1.0, 0.0)


class LongestMatchPolicy(Policy):
    """Whoever has most of the prompt; load does not count."""

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        return -predicted.device_tokens.astype(float)


class FlexLBPolicy(Policy):
    """RTP-LLM's COST_BASED_PREFILL: predicted prefill given the device's hit, and the wait.

    Drops who has over 3 times the mean of requests, or of wait; one of the near-best at random.
    """

    def pick(self, request: RouteRequest, engines: EngineViews, index: KVIndex, now: float) -> Choice | None:
        allowed = candidates(request, engines)
        if not allowed.any():
            return None
        predicted = predict(request, engines, index, self.cost, now, tiers=self.tiers)
        scores = predicted.total_s
        kept = allowed & within(engines.num_requests, allowed, HOT) & within(predicted.wait_s, allowed, HOT)
        row = self.one_of(near_best(np.where(kept if kept.any() else allowed, scores, np.inf), scores))
        return chosen(row, scores, allowed, engines, predicted, unit=1e3)


def within(amounts: np.ndarray, allowed: BoolArray, times: float) -> BoolArray:
    """Rows with at most so many times the mean of those allowed."""
    return np.asarray(amounts <= times * mean_of(amounts, allowed))


@dataclass(slots=True)
class SGLangPolicy(Policy):
    """SGLang's cache-aware router: the best match if it is over half of the prompt, else the smallest tree.

    When requests are out of balance (largest - smallest > 32 and > 1.0001 times), the shortest queue. Its tree is what
    it sent to a worker itself, so its size is what was new of that.
    """

    threshold: float = 0.5
    balance_abs: int = 32
    balance_rel: float = 1.0001
    tree_tokens: dict[str, int] = field(default_factory=dict)

    def pick(self, request: RouteRequest, engines: EngineViews, index: KVIndex, now: float) -> Choice | None:
        choice = Policy.pick(self, request, engines, index, now)
        if choice is not None:
            self.tree_tokens[choice.engine] = self.tree_tokens.get(choice.engine, 0) + choice.new_tokens
        return choice

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        queues = engines.num_requests
        least, most = int(queues[allowed].min()), int(queues[allowed].max())
        if most - least > self.balance_abs and most > self.balance_rel * least:
            return queues.astype(float)
        matched = np.where(allowed, predicted.device_tokens, 0)
        if matched.max() > self.threshold * request.prompt_tokens:
            return -matched.astype(float)
        return np.array([float(self.tree_tokens.get(name, 0)) for name in engines.names])


@dataclass(slots=True)
class DynamoPolicy(Policy):
    """NVIDIA Dynamo's KV router: blocks to prefill on the worker with this request, plus its active blocks.

    `overlap_weight` as its default 1.0; temperature 0: the least, ties at random.
    """

    overlap_weight: float = 1.0

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        new = engines.pending_tokens + request.prompt_tokens - predicted.device_tokens
        active = engines.num_blocks - engines.free_blocks
        return self.overlap_weight * new / engines.block_size + active


@dataclass(slots=True)
class PreblePolicy(Policy):
    """Preble's E2: exploit the longest cached prefix if it is longer than the rest, else explore the least cost.

    Explore: load + cost of what is evicted (new tokens times the share of hits so far) + prefill. Exploiting gives way
    when the engine's load is over `imbalance` times the least.
    """

    imbalance: float = 2.0
    hits: float = 0.0  # share of prompt tokens, so far

    def scores(
        self, request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, now: float
    ) -> FloatArray:
        cached = np.where(allowed, predicted.device_tokens, 0)
        best = int(cached.max())
        self.hits += 0.01 * (best / request.prompt_tokens - self.hits)
        load = predicted.wait_s
        explore = load + predicted.prefill_s * (1 + self.hits)
        if best <= request.prompt_tokens - best:
            return explore
        holders = allowed & (cached == best)
        least = float(load[allowed].min())
        if float(load[holders].min()) > self.imbalance * max(least, float(predicted.prefill_s[allowed].max())):
            return explore
        return np.where(holders, load, 1e9)


def fetch_from_best(
    request: RouteRequest, engines: EngineViews, predicted: Prediction, allowed: BoolArray, cost: CostModel
) -> tuple[IntArray, Prediction] | None:
    """(per row, of those it can copy from the one with the longest hit in its device; what it gets by copying).

    None: nobody has anything to copy, or no link between engines is known.
    """
    if math.isinf(cost.move_seconds(engines.block_bytes, PEER)):
        return None
    own = np.where(allowed, predicted.device_tokens, 0)
    if engines.reach is None:
        best_row = int(own.argmax())
        best_hit = int(own[best_row])
        if not best_hit:
            return None
        src, hit = np.full(len(own), best_row), np.full(len(own), best_hit)
        lacked = best_hit - own
        prefill_s = engines.slowness * cost.prefill_seconds(request.prompt_tokens - best_hit, best_hit)
    else:
        holders = np.argsort(-own, kind="stable")[:MAX_SOURCES]
        offered = np.where(engines.reach[:, holders], own[holders], 0)
        best = offered.argmax(axis=1)
        src, hit = holders[best], offered[np.arange(len(own)), best]
        if not hit.any():
            return None
        lacked = np.maximum(hit - own, 0)
        prefill_s = prefill_after(hit, request.prompt_tokens, cost) * engines.slowness
    load_s = load_seconds(lacked // engines.block_size, engines.block_bytes, PEER, cost, nothing=np.inf)
    return src, Prediction(predicted.wait_s, load_s, prefill_s, own, hit, request.prompt_tokens - hit)


def copy_of(request: RouteRequest, engines: EngineViews, src: int, dst: int, tokens: int) -> Replicate:
    """The copy of a prompt's first tokens."""
    return Replicate(tuple(request.hashes[: tokens // engines.block_size]), engines.names[src], engines.names[dst])


@dataclass(slots=True)
class MooncakePolicy(Policy):
    """Mooncake's Conductor: the least estimated TTFT, of computing from the own prefix or of fetching the best one.

    A prefix is fetched from the engine that has the best one when that is over `balancing` times the own.
    Source: Qin et al. 2025, algorithm 1.
    """

    balancing: float = 2.0

    def pick(self, request: RouteRequest, engines: EngineViews, index: KVIndex, now: float) -> Choice | None:
        allowed = candidates(request, engines)
        if not allowed.any():
            return None
        predicted = predict(request, engines, index, self.cost, now, tiers=self.tiers)
        found = fetch_from_best(request, engines, predicted, allowed, self.cost)
        if found is None:
            row = self.among(np.where(allowed, predicted.total_s, np.inf))
            return chosen(row, predicted.total_s, allowed, engines, predicted, unit=1e3)
        src, fetched = found
        own, best = predicted.device_tokens, fetched.hit_tokens
        fetches = (best > self.balancing * own) & np.isfinite(fetched.load_s)
        # The transfer is counted in full, as in the algorithm, though it may run while the request waits.
        scores = np.where(fetches, fetched.wait_s + fetched.load_s + fetched.prefill_s, predicted.total_s)
        row = self.among(np.where(allowed, scores, np.inf))
        if not fetches[row]:
            return chosen(row, scores, allowed, engines, predicted, unit=1e3)
        copies = (copy_of(request, engines, int(src[row]), row, int(best[row])),)
        return chosen(row, scores, allowed, engines, fetched, copies, unit=1e3)


@dataclass(slots=True)
class LeastTimePolicy(Policy):
    """Ours: the least predicted time to the first token, over all tiers, counting also whom the prompt delays.

    Of the near-best the one that computes least, for that costs the fleet least; of equals one at random.
    What a peer's device holds is one more tier: it is copied where that is sooner. Hard filters: alive, memory, the
    SLO, requests over 3 times the mean (and over `hot_floor`, for with few requests a mean says little). Where all are
    filtered out, the last two do not count. Prefixes in high demand are copied to further engines ahead of need.
    """

    tail_s: float = 0.0  # of the transfer to a decode engine that a prompt's length does not change
    hot_floor: int = 4
    hot: HotPrefixes | None = None

    def pick(self, request: RouteRequest, engines: EngineViews, index: KVIndex, now: float) -> Choice | None:
        allowed = candidates(request, engines)
        if not allowed.any():
            return None
        predicted = predict(request, engines, index, self.cost, now, tiers=self.tiers)
        total, prefill_s, new_tokens = predicted.total_s, predicted.prefill_s, predicted.new_tokens
        found = fetch_from_best(request, engines, predicted, allowed, self.cost)
        if found is not None:
            src, fetched = found
            fetched_s = fetched.total_s
            fetches = fetched_s < total
            if fetches.any():
                total = np.where(fetches, fetched_s, total)
                prefill_s = np.where(fetches, fetched.prefill_s, prefill_s)
                new_tokens = np.where(fetches, fetched.new_tokens, new_tokens)
            else:
                found = None
        mean = mean_of(engines.num_requests, allowed)
        # Prompts that come while an engine has work wait for all of it. By Little's law (arrivals times mean wait) they
        # are as many as there are in a queue, at any load, so no rate has to be measured; the one that runs is not.
        scores = total + (mean - 1.0) * prefill_s if mean > 1.0 else total
        kept = allowed & (engines.num_requests <= max(HOT * mean, self.hot_floor))
        if request.ttft_slo_s is not None:
            in_time = kept & (total <= request.ttft_slo_s - SLO_MARGIN_S - self.tail_s)
            kept = in_time if in_time.any() else kept
        scores = np.where(kept if kept.any() else allowed, scores, np.inf)
        near = near_best(scores, total, self.tail_s)
        new_near = new_tokens[near]
        row = self.one_of(near[new_near == new_near.min()])
        copies: tuple[Replicate, ...] = ()
        expected = predicted
        if found is not None and fetches[row]:
            copies, expected = (copy_of(request, engines, int(src[row]), row, int(fetched.hit_tokens[row])),), fetched
        if self.hot is not None:
            copies += self.hot.copies(request, engines, predicted, allowed, self.cost, now)
        return chosen(row, total, allowed, engines, expected, copies, unit=1e3)


PREFILL_POLICIES: dict[str, type[Policy]] = {
    "random": RandomPolicy,
    "round_robin": RoundRobinPolicy,
    "least_loaded": LeastLoadedPolicy,
    "fewest_requests": FewestRequestsPolicy,
    "consistent_hash": ConsistentHashPolicy,
    "longest_match": LongestMatchPolicy,
    "flexlb": FlexLBPolicy,
    "sglang": SGLangPolicy,
    "dynamo": DynamoPolicy,
    "preble": PreblePolicy,
    "mooncake": MooncakePolicy,
    "least_time": LeastTimePolicy,
}


def prefill_policy(name: str, cost: CostModel, seed: int = 0, *, tiers: bool = True) -> Policy:
    """A policy by its name. Raises KeyError for an unknown one."""
    policy = PREFILL_POLICIES[name](cost, random.Random(seed), tiers)
    if isinstance(policy, LeastTimePolicy):
        policy.hot = HotPrefixes()
    return policy
