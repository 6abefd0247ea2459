"""A pretended tier: it has every block ever published, offers runs of them, and loads late, badly or not at all.

A KVSource and the mover of its loads, played by a World. Contents are those of the pretended rank's memory.
"""

from __future__ import annotations

from tests.fakes.executor import FakeExecutor

from penstock.core.moves import KVMove, MoveResult, Place
from penstock.core.request import Request
from penstock.core.scheduler import Scheduler
from penstock.core.traffic import Offer

WAITING = "tier"


class FakeTiers:
    """`pending`: loads whose end the scheduler was not told yet."""

    def __init__(self, scheduler: Scheduler, executor: FakeExecutor) -> None:
        self.scheduler, self.executor = scheduler, executor
        self.pending: dict[int, KVMove] = {}
        self.num_offers = self.num_loaded = self.num_bad = 0
        self._saved: dict[tuple[int, bytes], list[int]] = {}
        self._came: dict[int, bool] = {}  # loads that a step has waited for: did they come?
        scheduler.source = self
        executor.load = self.force

    def save(self) -> None:
        """Copy what is published now."""
        for g, pool in enumerate(self.scheduler.pools):
            for hash_, block in pool.index.items():
                self._saved.setdefault((g, hash_), list(self.executor.kv[g][block.id]))

    def offer(self, request: Request, num_blocks: int, now: float) -> Offer | str | None:
        _, hashes = self.scheduler.kv.ask(request)
        end = num_blocks
        while end < len(hashes) and all((g, hashes[end]) in self._saved for g in range(len(self.scheduler.pools))):
            end += 1
        self.num_offers += 1
        mood = hash((request.seed, self.num_offers)) % 8
        if end == num_blocks or mood == 0:
            return None
        if mood == 1:
            return WAITING
        end -= mood % 3 if end - num_blocks > mood % 3 else 0
        keys = tuple(hashes[num_blocks:end])
        return Offer(end * self.scheduler.block_size, Place("host", keys=keys), request.id, is_cache=mood > 3)

    def start(self) -> None:
        """As an engine does after each plan."""
        traffic = self.scheduler.traffic
        self.pending.update((move.id, move) for move in traffic.started)
        for id_ in traffic.cancelled:
            if id_ in self.pending:
                self._came.setdefault(id_, False)
        traffic.started, traffic.cancelled = [], []

    def force(self, id_: int) -> bool:
        """A step waits for the load: it comes now, or has failed."""
        if id_ not in self._came:
            self._came[id_] = hash((id_, self.num_offers)) % 4 > 0
            if self._came[id_]:
                self._copy(self.pending[id_])
        return self._came[id_]

    def land(self, number: int, now: float) -> None:
        """One load ends, and the scheduler is told."""
        id_ = list(self.pending)[number % len(self.pending)]
        came = self.force(id_)
        del self.pending[id_]
        self.num_loaded += came
        self.num_bad += not came
        self.scheduler.moved(MoveResult(id_, None if came else "it was damaged"), now)

    def _copy(self, move: KVMove) -> None:
        for g, ids in enumerate(move.dst.block_ids):
            for key, id_ in zip(move.src.keys, ids, strict=True):
                if id_:
                    self.executor.kv[g][id_] = list(self._saved[g, key])
