"""What a router knows of its engines, and what one decision says. The policies are in `route_policies`.

Bookkeeping only: no clock, socket or thread. Engines are rows of columns, for a decision looks at all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.core.cost import FloatArray, IntArray
from penstock.core.doors import CostModel
from penstock.core.kv_events import TIERS
from penstock.core.kv_index import KVIndex

BoolArray = NDArray[np.bool_]
RESERVED_S = 5.0  # a reservation that is not renewed
ALPHA = 0.1  # weight of the newest request in what is learnt of an engine
SLOWNESS = (0.25, 4.0)
MANY = 16  # rows: more are computed as arrays
DISTRUST = 0.8  # hits that came true less often than this are counted as far as they did; above it, luck


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a router must know of a request. `hashes`: of the prompt's full blocks, but for the last token's."""

    id: str
    prompt_tokens: int
    hashes: Sequence[bytes]
    output_tokens: int = 0  # expected
    ttft_slo_s: float | None = None


@dataclass(frozen=True, slots=True)
class Replicate:
    """Copy a hot prefix: it costs less than to compute it once more."""

    hashes: tuple[bytes, ...]
    src: str
    dst: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, and why. `terms` add up to `predicted_ms` where the policy predicts a time.

    `hit_tokens`: how many of the prompt the engine is believed to have or to load; `new_tokens`: the others.
    """

    engine: str
    row: int
    predicted_ms: float
    terms: Mapping[str, float]
    runner_ups: tuple[tuple[str, float], ...]
    hit_tokens: int
    new_tokens: int
    prefill_s: float  # predicted, without waiting
    copies: tuple[Replicate, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What an engine says of itself. `known`: requests that its numbers already count."""

    num_running: int
    free_blocks: int
    known: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Sent:
    """A prompt on an engine, as the router counts it."""

    row: int
    sent_s: float
    seconds: float  # predicted
    new_tokens: int
    hit_tokens: int


@dataclass(slots=True)
class _Reserved:
    row: int
    num_blocks: int
    until_s: float


@dataclass(slots=True)
class EngineViews:
    """All engines of one router, as columns; row numbers are the index's. Written by the router's events alone.

    `block_size` in tokens, `block_bytes` of KV; the same for all engines, or blocks could not be shared.
    """

    index: KVIndex
    block_size: int
    block_bytes: int
    names: list[str] = field(default_factory=list)
    alive: BoolArray = field(default_factory=lambda: np.zeros(0, bool))
    num_requests: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # prompts sent and not done
    pending_tokens: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # of them, not in a cache
    pending_s: FloatArray = field(default_factory=lambda: np.zeros(0))  # of them, predicted
    busy_until_s: FloatArray = field(default_factory=lambda: np.zeros(0))
    slowness: FloatArray = field(default_factory=lambda: np.zeros(0))  # measured / predicted
    trust: FloatArray = field(default_factory=lambda: np.zeros(0))  # hits that came true / hits that were believed
    num_blocks: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    free_blocks: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # reservations counted as taken
    slots: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_running: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # reservations counted
    _last_done_s: FloatArray = field(default_factory=lambda: np.zeros(0))
    _sent: dict[str, _Sent] = field(default_factory=dict)
    _reserved: dict[str, _Reserved] = field(default_factory=dict)

    # ---- engines ----

    def add(self, engine: str, *, num_blocks: int, slots: int = 256) -> int:
        """A new engine with an empty device; its row."""
        row = self.index.add(engine, max_blocks=None)
        while len(self.names) <= row:
            self._append_row()
        self.names[row] = engine
        for column in (self.num_requests, self.pending_tokens, self.num_running):
            column[row] = 0
        for times in (self.pending_s, self.busy_until_s, self._last_done_s):
            times[row] = 0.0
        self.slowness[row] = self.trust[row] = 1.0
        self.num_blocks[row] = self.free_blocks[row] = num_blocks
        self.slots[row] = slots
        self.alive[row] = True
        return row

    def add_pool(self, name: str) -> int:
        """A shared pool: in the index, never chosen."""
        row = self.index.add(name, shared=True)
        while len(self.names) <= row:
            self._append_row()
        self.names[row] = name
        self.alive[row] = False
        return row

    def remove(self, engine: str) -> list[str]:
        """The engine is dead: it is never chosen again. The requests that were on it."""
        row = self.index.rows[engine]
        self.index.remove(engine)
        self.alive[row] = False
        self.names[row] = ""
        lost = [id_ for id_, sent in self._sent.items() if sent.row == row]
        for id_ in lost:
            del self._sent[id_]
        for id_ in [id_ for id_, reserved in self._reserved.items() if reserved.row == row]:
            del self._reserved[id_]
        return lost

    def _append_row(self) -> None:
        self.names.append("")
        for name in (
            "alive", "num_requests", "pending_tokens", "pending_s", "busy_until_s", "slowness", "trust", "num_blocks",
            "free_blocks", "slots", "num_running", "_last_done_s",
        ):  # fmt: skip
            column = getattr(self, name)
            setattr(self, name, np.append(column, np.zeros(1, column.dtype)))

    def wait_s(self, now: float) -> FloatArray:
        """Predicted work before a new prompt, per row."""
        return np.maximum(self.busy_until_s - now, 0.0)

    # ---- prompts: counted when they are sent, corrected when they are done ----

    def sent(self, request_id: str, choice: Choice, now: float) -> None:
        """A prompt goes to the chosen engine."""
        row, seconds = choice.row, choice.prefill_s * float(self.slowness[choice.row])
        self._sent[request_id] = _Sent(row, now, seconds, choice.new_tokens, choice.hit_tokens)
        self.num_requests[row] += 1
        self.pending_tokens[row] += choice.new_tokens
        self.pending_s[row] += seconds
        self.busy_until_s[row] = max(float(self.busy_until_s[row]), now) + seconds

    def done(self, request_id: str, now: float, hit_tokens: int | None = None) -> None:
        """Its first token is there, or it ended otherwise. `hit_tokens`: how many the cache really had."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return
        row = sent.row
        self.num_requests[row] -= 1
        self.pending_tokens[row] -= sent.new_tokens
        self.pending_s[row] = max(0.0, float(self.pending_s[row]) - sent.seconds)
        self.busy_until_s[row] = now + float(self.pending_s[row])
        if hit_tokens is not None:
            if sent.hit_tokens:
                ratio = min(1.0, hit_tokens / sent.hit_tokens)
                self.trust[row] += ALPHA * (ratio - self.trust[row])
            began = max(sent.sent_s, float(self._last_done_s[row]))
            predicted = sent.seconds / float(self.slowness[row])
            if predicted > 0 and hit_tokens >= sent.hit_tokens:  # else it was the hit that was wrong
                low, high = SLOWNESS
                ratio = min(max((now - began) / predicted, low), high)
                self.slowness[row] += ALPHA * (ratio - self.slowness[row])
        self._last_done_s[row] = now

    # ---- decodes: reserved when they are placed, until the engine counts them itself ----

    def reserve(self, request_id: str, row: int, num_blocks: int, now: float) -> None:
        """A slot and blocks, counted at once."""
        self.release(request_id)
        self._reserved[request_id] = _Reserved(row, num_blocks, now + RESERVED_S)
        self.num_running[row] += 1
        self.free_blocks[row] -= num_blocks

    def renew(self, request_id: str, now: float) -> None:
        """Its transfer makes progress."""
        if request_id in self._reserved:
            self._reserved[request_id].until_s = now + RESERVED_S

    def release(self, request_id: str) -> None:
        """It will not come, or has ended."""
        reserved = self._reserved.pop(request_id, None)
        if reserved is not None:
            self.num_running[reserved.row] -= 1
            self.free_blocks[reserved.row] += reserved.num_blocks

    def report(self, engine: str, report: EngineReport, now: float) -> None:
        """The engine's own numbers, and what it cannot know of yet on top."""
        row = self.index.rows[engine]
        self.num_running[row], self.free_blocks[row] = report.num_running, report.free_blocks
        for id_, reserved in list(self._reserved.items()):
            if reserved.row != row:
                continue
            if id_ in report.known or reserved.until_s <= now:
                del self._reserved[id_]
            else:
                self.num_running[row] += 1
                self.free_blocks[row] -= reserved.num_blocks


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
    blocks = index.match(request.hashes).blocks.astype(np.int64)
    longest = max(prompt - 1, 0)
    device = _believed(blocks[0], engines.trust, size, longest)
    prefill_s = prefill_after(device, prompt, cost)
    load_s, hit = np.zeros(len(device)), device
    if tiers and blocks[1:].any():
        for tier, counts in zip(TIERS[1:], blocks[1:], strict=True):
            load_s += load_seconds(counts, engines.block_bytes, tier, cost)
        with_loads = _believed(blocks.sum(axis=0), engines.trust, size, longest)
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
    more = np.flatnonzero(hits > least)
    if len(more) > MANY:
        seconds[more] = cost.prefill_seconds_each(prompt_tokens - hits[more], hits[more])
    else:
        for row in more.tolist():
            hit = int(hits[row])
            seconds[row] = cost.prefill_seconds(prompt_tokens - hit, hit)
    return seconds


def load_seconds(counts: IntArray, block_bytes: int, tier: str, cost: CostModel) -> FloatArray:
    """Of loading so many blocks, per row. Moves are affine in their bytes, so two of them tell all."""
    most = int(counts.max())
    if not most:
        return np.zeros(len(counts))
    one, all_ = cost.move_seconds(block_bytes, tier), cost.move_seconds(most * block_bytes, tier)
    if math.isinf(all_):
        return np.where(counts > 0, np.inf, 0.0)
    each = (all_ - one) / (most - 1) if most > 1 else 0.0
    return np.where(counts > 0, one + (counts - 1) * each, 0.0)
