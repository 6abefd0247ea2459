"""The KV pool's process on virtual time, its stores, and the copies between its slots and pretended ranks' blocks.

The pool is the real one; disk and remote store are dictionaries that answer late, fail, or keep a block damaged. Slots
hold copies of a pretended rank's KV, so a slot that is somebody else's by now gives a wrong token unless it is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.fakes.peer_pool import PEER, PretendedPeer

from penstock.config.model import KVLayout
from penstock.core.kv_pool import DELETE, FIND, READ, Answers, KVPool
from penstock.core.moves import CANCELLED, DEVICE, KVMove, MoveResult
from penstock.core.tiering import (
    BAD_BLOCK,
    WRITE_SELECTIVE,
    WRITE_THROUGH,
    Job,
    TierSettings,
    ToEngine,
    ToPool,
    key_group,
)
from penstock.sim.clock import VirtualClock, stream

Slots = dict[tuple[int, int], "Record"]  # (group, slot)


@dataclass(frozen=True, slots=True)
class Record:
    """What a slot or a store keeps. Not `whole`: it is being written, or was damaged: its checksum fails."""

    key: bytes
    content: tuple[int, ...] = ()
    whole: bool = True

    def holds(self, key: bytes) -> bool:
        return self.whole and self.key == key


NOTHING = Record(b"", whole=False)


@dataclass(frozen=True)
class TierFaults:
    """Seconds and probabilities: of a store's job that it fails, of a block that it is kept or copied damaged."""

    host_blocks: int = 40
    disk_blocks: int = 60
    has_remote: bool = False
    peer_until_s: float = 0.0  # another machine's pool takes and brings blocks until then
    write: str = WRITE_THROUGH
    lease_s: float = 1.0
    job_s: float = 0.001
    fails: float = 0.0
    damages: float = 0.0
    copy_s: float = 0.0002  # of a block between slot and device
    late: float = 0.0  # of a copy: that it takes `late_s`
    late_s: float = 0.2


@dataclass
class Stores:
    """What outlives the pool's process: per tier, key -> (record, parent, seconds to recompute)."""

    kept: dict[str, dict[bytes, tuple[Record, bytes, float]]] = field(
        default_factory=lambda: {"disk": {}, "remote": {}}
    )
    elsewhere: dict[bytes, tuple[Record, bytes]] = field(default_factory=dict)  # at another machine


class PretendedPool:
    """One life of the pool's process. `send(source, answer)` brings an answer to its engine."""

    def __init__(
        self,
        clock: VirtualClock,
        seed: int,
        layout: KVLayout,
        faults: TierFaults,
        stores: Stores,
        life: int,
        send: Callable[[str, ToEngine], None],
    ) -> None:
        self.clock, self.faults, self.stores, self._send = clock, faults, stores, send
        self.alive, self.stopped_until_s = True, 0.0
        self.slots: Slots = {}
        self.num_bad = 0
        self._gone: set[str] = set()  # engines whose connection broke
        size = len(layout.groups)
        pause = {"retry_s": 0.2, "max_retry_s": 1.0, "batch_bytes": 200, "latency_s": 1e-5, "byte_s": 1e-9}
        tiers = [TierSettings("disk", (faults.disk_blocks,) * size, faults.write, **pause)]  # type: ignore[arg-type]
        if faults.has_remote:
            tiers.append(TierSettings("remote", None, WRITE_SELECTIVE, **pause))  # type: ignore[arg-type]
        host = (faults.host_blocks,) * size
        self.pool = KVPool([g.block_bytes for g in layout.groups], host, tiers, "lru", faults.lease_s)
        disk = stores.kept["disk"]
        self.pool.adopt("disk", [(key, parent, cost) for key, (_, parent, cost) in disk.items()], clock.now())
        self._random = stream(seed, "pool", life)
        self._jobs: dict[str, list[Job]] = {tier.name: [] for tier in tiers}
        self._submit()
        self._beat()
        self.peer: PretendedPeer | None = None
        if faults.peer_until_s:
            draws = stream(seed, "peer", life)
            self.peer = PretendedPeer(self, draws, stores.elsewhere, faults.peer_until_s)

    def lost(self, source: str) -> None:
        """The engine's connection broke."""
        if self.alive and source not in self._gone:
            self._gone.add(source)
            self.pool.lost(source, self.clock.now())
            self._submit()

    def handle(self, source: str, message: ToPool) -> None:
        if source in self._gone:
            return  # the last word of a dead engine
        self._answer(self.pool.handle(source, message, self.clock.now()))

    def close(self) -> None:
        """Killed: slots are gone with it."""
        self.alive = False

    def _beat(self) -> None:
        if self.alive:
            if self.clock.now() >= self.stopped_until_s:
                self._answer(self.pool.tick(self.clock.now()))
            self.clock.call_in(0.05, self._beat)

    def _answer(self, answers: Answers) -> None:
        for source, answer in answers:
            if source != PEER:
                self._send(source, answer)
            elif self.peer is not None:
                self.peer.hear(answer)
        self._submit()

    def _submit(self) -> None:
        for job in self.pool.jobs():
            queue = self._jobs[job.tier]
            queue.append(job)
            if len(queue) == 1:
                self._begin(queue)

    def _begin(self, queue: list[Job]) -> None:
        seconds = self.faults.job_s * (0.5 + self._random.random())
        self.clock.call_in(seconds, lambda: self._end(queue, seconds))

    def _end(self, queue: list[Job], seconds: float) -> None:
        if not self.alive:
            return
        if self.clock.now() < self.stopped_until_s:
            self.clock.call_at(self.stopped_until_s, lambda: self._end(queue, seconds))
            return
        job = queue.pop(0)
        if self._random.random() < self.faults.fails:
            ok, error = [False] * len(job.keys), "the disk is on fire"
        else:
            ok, error = self._do(job), None
        if queue:
            self._begin(queue)
        self._answer(self.pool.job_done(job.id, ok, seconds, self.clock.now(), error))

    def _do(self, job: Job) -> list[bool]:
        kept = self.stores.kept[job.tier]
        if job.kind == DELETE:
            for key in job.keys:
                kept.pop(key, None)
            return [True] * len(job.keys)
        if job.kind == FIND:
            return [key in kept for key in job.keys]
        places = [(key_group(key), slot) for key, slot in zip(job.keys, job.slots, strict=True)]
        if job.kind == READ:
            ok = []
            for key, place in zip(job.keys, places, strict=True):
                self.slots[place] = kept[key][0] if key in kept else NOTHING
                ok.append(self.slots[place].holds(key))
                self.num_bad += not ok[-1]
            return ok
        for key, place, parent, cost in zip(job.keys, places, job.parents, job.costs_s, strict=True):
            record = self.slots.get(place, NOTHING)
            damaged = self._random.random() < self.faults.damages
            kept[key] = Record(record.key, record.content, record.whole and not damaged), parent, cost
            if job.tier == "remote" and len(kept) > self.faults.disk_blocks:
                del kept[next(iter(kept))]  # it evicts by itself
        return [True] * len(job.keys)


class BlockMemory(Protocol):
    def read(self, group: int, block_id: int) -> Any: ...

    def write(self, group: int, block_id: int, content: Any) -> None: ...


@dataclass(slots=True)
class _Copy:
    move: KVMove
    items: list[tuple[int, int, int, bytes]]  # group, device block, slot, key
    slots: Slots  # of the pool's life in which it began: a mapping stays when the process goes
    num_done: int = 0
    cancelled: bool = False
    bad_at: int = -1  # copied wrongly


class PretendedCopies:
    """A Mover between a rank's blocks and the pool's slots, one move at a time, block by block.

    A load that is cancelled or damaged may still write a block: blocks of a move are nobody else's until its end.
    """

    def __init__(
        self,
        clock: VirtualClock,
        random: Any,
        memory: BlockMemory,
        faults: TierFaults,
        slots: Callable[[], Slots],
        notify: Callable[[], None],
    ) -> None:
        self.clock, self.faults, self._memory, self._random = clock, faults, memory, random
        self._slots, self._notify = slots, notify
        self.alive = True
        self.num_loaded = self.num_bad = self.num_saved = self.num_forced = 0
        self.paused_until_s = 0.0
        self._queue: list[_Copy] = []
        self._ended: dict[int, bool] = {}  # loads: did they come?
        self._results: list[MoveResult] = []

    # ---- the door ----

    def start(self, move: KVMove) -> None:
        here, there = (move.dst, move.src) if move.dst.where == DEVICE else (move.src, move.dst)
        keys, items = iter(there.keys), []
        for group, (ids, slots) in enumerate(zip(here.block_ids, there.block_ids, strict=True)):
            items += [(group, id_, slot, key) for id_, slot, key in zip(ids, slots, keys, strict=False) if id_ and slot]
        bad_at = self._random.randrange(len(items)) if items and self._random.random() < self.faults.damages else -1
        self._queue.append(_Copy(move, items, self._slots(), bad_at=bad_at))
        if len(self._queue) == 1:
            self._go_on()

    def expect(self, move_id: int, num_units: int, checksum: int) -> None:
        """Not for tiers."""

    def cancel(self, move_id: int) -> None:
        for copy in self._queue:
            if copy.move.id == move_id:
                copy.cancelled = True

    def poll(self) -> Sequence[MoveResult]:
        results, self._results = self._results, []
        return results

    def force(self, move_id: int) -> bool:
        """A step waits for this load: whether all of it came."""
        for copy in list(self._queue):
            if copy.move.id == move_id:
                self.num_forced += 1
                while move_id not in self._ended:
                    self._advance(copy)
        return self._ended[move_id]

    # ---- the thread ----

    def _go_on(self) -> None:
        if self._queue and self.alive:
            seconds = self.faults.late_s if self._random.random() < self.faults.late else self.faults.copy_s
            copy = self._queue[0]
            when = max(self.clock.now() + seconds, self.paused_until_s)
            self.clock.call_at(when, lambda: self._tick(copy))

    def _tick(self, copy: _Copy) -> None:
        if self.alive:
            if copy in self._queue:
                self._advance(copy)
            self._go_on()

    def _advance(self, copy: _Copy) -> None:
        """One block more, or the end."""
        is_load, n = copy.move.dst.where == DEVICE, copy.num_done
        if n < len(copy.items):
            group, id_, slot, key = copy.items[n]
            if is_load:
                record = copy.slots.get((group, slot), NOTHING)
                good = record.holds(key) and n != copy.bad_at
                self._memory.write(group, id_, record.content if good else [hash(("bad", group, id_))] * 4)
                if not good:
                    self._end(copy, BAD_BLOCK)
                    return
            else:
                copy.slots[group, slot] = NOTHING  # cleared first, sealed last
            copy.num_done += 1
            if copy.cancelled:
                self._end(copy, CANCELLED)
            return
        if copy.cancelled:
            self._end(copy, CANCELLED)
            return
        if not is_load:
            for n, (group, id_, slot, key) in enumerate(copy.items):
                copy.slots[group, slot] = Record(key, tuple(self._memory.read(group, id_)), n != copy.bad_at)
        self._end(copy, None)

    def _end(self, copy: _Copy, error: str | None) -> None:
        self._queue.remove(copy)
        if copy.move.dst.where == DEVICE:
            self._ended[copy.move.id] = error is None
            self.num_loaded += error is None
            self.num_bad += error == BAD_BLOCK
        else:
            self.num_saved += error is None
        self._results.append(MoveResult(copy.move.id, error, len(copy.items), 256 * len(copy.items), seconds=0.0005))
        self._notify()
