"""A tier below host memory as its pool sees it: what it holds, what waits for its store, whether it works and pays.

Written by `KVPool` alone. Knows keys and seconds; no message, no byte, no thread.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.core.eviction import Entry, TierIndex
from penstock.core.tier_costs import LinearRate, TierWorth
from penstock.core.tiering import TierEvent, TierRate, TierSettings, key_group

MAX_KNOWN = 1_000_000  # keys that a shared tier is remembered to hold


@dataclass(slots=True)
class TierCounts:
    """Of one tier, in blocks, since the start."""

    num_found: int = 0  # looked up, and this was the fastest tier that held them
    num_read: int = 0
    num_written: int = 0
    num_bad: int = 0  # were to be there and were not, or failed their checksum


class LowerTier:
    """`indexes`: one per KV group; None where the tier is shared with other machines and evicts by itself."""

    def __init__(self, settings: TierSettings, record_bytes: Sequence[int], policy: str) -> None:
        self.settings = settings
        self.name = settings.name
        self.record_bytes = record_bytes
        self.indexes: list[TierIndex] | None = None
        if settings.num_blocks is not None:
            sizes = zip(settings.num_blocks, record_bytes, strict=True)
            self.indexes = [TierIndex(num_blocks, num_bytes, policy) for num_blocks, num_bytes in sizes]
        self.known: OrderedDict[bytes, None] = OrderedDict()  # of a shared tier: what it had when last heard of
        self.rate = LinearRate(settings.latency_s, settings.byte_s)
        self.worth = TierWorth()
        self.counts = TierCounts()
        self.reads: deque[bytes] = deque()
        self.writes: OrderedDict[bytes, None] = OrderedDict()
        self.writing: dict[bytes, int] = {}  # key -> its slot in `indexes`, 0 without one
        self.num_jobs = 0  # reads and writes in the store's hands
        self.failed_until_s: float | None = None
        self.unwritable_until_s: float | None = None
        self._retry_s = settings.retry_s
        self._was_failing = False

    # ---- contents ----

    @property
    def is_shared(self) -> bool:
        """With other machines: its contents are not this pool's to know or to evict."""
        return self.indexes is None

    def adopt(self, records: Iterable[tuple[bytes, bytes, float]], now: float) -> list[bytes]:
        """Take in what the store holds: (key, parent, seconds to recompute). Gives the keys that there is no room for.

        Not for shared tiers.
        """
        assert self.indexes is not None
        surplus = []
        for key, parent, recompute_s in records:
            group = key_group(key)
            if group >= len(self.indexes) or not self.indexes[group].num_free:
                surplus.append(key)
            elif key not in self.indexes[group]:
                slot, _ = self.indexes[group].reserve() or (0, None)
                self.indexes[group].publish(key, parent, slot, recompute_s, now)
        return surplus

    def holds(self, key: bytes) -> bool:
        return key in self.known if self.indexes is None else key in self.indexes[key_group(key)]

    def index(self, key: bytes) -> TierIndex | None:
        return None if self.indexes is None else self.indexes[key_group(key)]

    def pin(self, key: bytes, now: float) -> None:
        """It is about to be read."""
        index = self.index(key)
        if index is not None:
            entry = index.entries[key]
            index.pin(entry)
            index.touch(entry, now)

    def queue_read(self, key: bytes, now: float) -> None:
        """It is wanted in host memory."""
        self.pin(key, now)
        self.reads.append(key)

    def unpin(self, key: bytes) -> None:
        index = self.index(key)
        if index is not None:
            index.unpin(index.entries[key])

    def forget(self, key: bytes) -> None:
        """It is not there, or not what it should be."""
        self.known.pop(key, None)
        index = self.index(key)
        if index is not None and (entry := index.remove(key)) is not None:
            self.worth.spent(entry.spent_s)

    def make_room(self, key: bytes) -> tuple[bool, Entry | None]:
        """For a block to be written: whether there is, and what has to be deleted first."""
        index = self.index(key)
        if index is None:
            self.writing[key] = 0
            return True, None
        got = index.reserve()
        if got is None:
            return False, None
        self.writing[key], victim = got
        if victim is not None:  # a write is an investment: what it cost is known to be lost or won when the block goes
            self.worth.spent(victim.spent_s)
        return True, victim

    def written(self, key: bytes, parent: bytes, recompute_s: float, ok: bool, seconds: float, now: float) -> None:
        """The end of what `make_room` began."""
        slot, index = self.writing.pop(key), self.index(key)
        self.counts.num_written += ok
        if index is None:
            if ok:
                self.remember(key)
        elif ok:
            index.publish(key, parent, slot, recompute_s, now).spent_s = seconds
        else:
            index.give_back(slot)

    def remember(self, key: bytes) -> None:
        """A shared tier holds it."""
        self.known[key] = None
        self.known.move_to_end(key)
        if len(self.known) > MAX_KNOWN:
            self.known.popitem(last=False)

    def predict(self) -> TierRate:
        """For the next run of blocks, behind the reads that wait already."""
        num_bytes = sum(self.record_bytes[key_group(key)] for key in self.reads)
        return TierRate(self.name, self.rate.seconds(num_bytes), self.rate.byte_s)

    # ---- working, paying ----

    @property
    def is_working(self) -> bool:
        return self.failed_until_s is None

    @property
    def state(self) -> str:
        """For people."""
        if self.failed_until_s is not None:
            return "off: it fails"
        if not self.worth.is_on:
            return "off: it does not pay"
        return "on" if self.unwritable_until_s is None else "read only: it takes nothing"

    @property
    def is_on(self) -> bool:
        return self.failed_until_s is None and self.worth.is_on

    @property
    def takes_writes(self) -> bool:
        return self.is_on and self.unwritable_until_s is None

    def failed(self, is_write: bool, error: str, now: float) -> TierEvent | None:
        """Its store is in trouble: no more of it for a while. When writes fail, what is there can still be read."""
        if is_write and self.indexes is not None:
            if self.unwritable_until_s is not None:
                return None
            self.unwritable_until_s, what = now + self._retry_s, "writes"
        else:
            if self.failed_until_s is not None:
                return None
            self.failed_until_s, what = now + self._retry_s, "tier"
        pause_s, self._retry_s = self._retry_s, min(2 * self._retry_s, self.settings.max_retry_s)
        self.writes.clear()
        if self._was_failing:
            return None
        self._was_failing = True
        return TierEvent(
            self.name, "failed", f"tier {self.name}: {error}; {what} off, tried again in {pause_s:g} s", now
        )

    def worked(self, is_write: bool, now: float) -> TierEvent | None:
        """Its store did what it was asked."""
        if not self._was_failing or (self.indexes is not None and not is_write and self.unwritable_until_s is not None):
            return None
        self._was_failing, self._retry_s = False, self.settings.retry_s
        return TierEvent(self.name, "on", f"tier {self.name}: works again", now)

    def review(self, now: float) -> list[TierEvent]:
        """Pauses that are over, and a window's verdict."""
        events = []
        if self.failed_until_s is not None and now >= self.failed_until_s:
            self.failed_until_s = None
        if self.unwritable_until_s is not None and now >= self.unwritable_until_s:
            self.unwritable_until_s = None
        verdict = self.worth.judge(now) if self.is_working else None
        if verdict is not None and not verdict.pays:
            self.writes.clear()
            pause_s = (self.worth.off_until_s or now) - now
            text = (
                f"tier {self.name}: off, it saved {verdict.saved_s * 1e3:.0f} ms and took"
                f" {verdict.spent_s * 1e3:.0f} ms over {verdict.num_uses} blocks; tried again in {pause_s:g} s"
            )
            events.append(TierEvent(self.name, "unprofitable", text, now))
        if self.worth.probe(now):
            events.append(TierEvent(self.name, "on", f"tier {self.name}: tried again", now))
        return events
