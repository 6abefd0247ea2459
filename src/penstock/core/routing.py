"""What a router knows of its engines, and what one decision says. Policies: `route_policies`, `decode_policies`.

Bookkeeping only: no clock, socket or thread. Engines are rows of columns, for a decision looks at all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.core.cost import FloatArray, IntArray
from penstock.core.kv_index import KVIndex

BoolArray = NDArray[np.bool_]
RESERVED_S = 5.0  # a reservation that is not renewed
ALPHA = 0.1  # weight of the newest request in what is learnt of an engine
SLOWNESS = (0.25, 4.0)


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
    _pools: dict[str, tuple[str, str]] = field(default_factory=dict)  # engine -> (reads, serves)
    _reach: BoolArray | None = None  # None: to be found
    _are_linked: bool = False
    _sent: dict[str, _Sent] = field(default_factory=dict)
    _reserved: dict[str, _Reserved] = field(default_factory=dict)

    # ---- engines ----

    def add(self, engine: str, *, num_blocks: int, slots: int = 256, max_held: int | None = None) -> int:
        """A new engine with an empty device; its row. `max_held`: what all its tiers hold at most (`KVIndex.add`)."""
        row = self.index.add(engine, max_blocks=max_held)
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
        self._reach = None
        return row

    def link(self, engine: str, reads: str, serves: str) -> None:
        """Where an engine's pool reads what others hold, and where it serves others: addresses, "" for none.

        From the first call on only engines that are linked copy from each other: one reads where the other serves, or
        both read in the same place, for what one computes it has written there.
        """
        if self._pools.get(engine, ("", "")) != (reads, serves):
            self._pools[engine] = reads, serves
            self._reach, self._are_linked = None, True

    @property
    def reach(self) -> BoolArray | None:
        """[row, row]: may the first copy what the second's device holds? None: all may, where a copy is possible."""
        if not self._are_linked:
            return None
        if self._reach is None:
            pools = [self._pools.get(name, ("", "")) for name in self.names]
            reads, serves = (np.array(places) for places in zip(*pools, strict=True))
            shared = (reads[:, None] == serves[None, :]) | (reads[:, None] == reads[None, :])
            self._reach = np.asarray(shared & (reads != "")[:, None])
        return self._reach

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
        self._pools.pop(engine, None)
        self._reach = None
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
