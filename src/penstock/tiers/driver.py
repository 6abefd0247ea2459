"""The pool at work: its state machine, and one thread per tier that does what it asks of a store.

`handle` and `poll` are called by one thread, with its clock, and give messages to deliver; only the stores block, in
threads of their own. Knows no engine and no wire.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Protocol

from penstock.core.doors import Store
from penstock.core.kv_pool import DELETE, READ, WRITE, Answers, KVPool
from penstock.core.tiering import Job, TierEvent, ToPool, key_group
from penstock.tiers.arena import Arena

log = logging.getLogger(__name__)


class TierStore(Store, Protocol):
    """A store that also says why it said no, what it holds, and ends."""

    error: str | None

    def find(self, keys: Sequence[bytes]) -> list[bool]: ...

    def close(self) -> None: ...


class StoreThread:
    """Does the jobs of one tier, in order. `poll` gives (job id, ok per key, seconds, error); `wake` is called, in the
    thread, when it has something to give."""

    def __init__(self, name: str, store: TierStore, arena: Arena, wake: Callable[[], None]) -> None:
        self.store = store
        self.arena = arena
        self._wake = wake
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, list[bool], float, str | None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"penstock-tier-{name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def poll(self) -> list[tuple[int, list[bool], float, str | None]]:
        done = []
        while not self._done.empty():
            done.append(self._done.get())
        return done

    def close(self) -> None:
        """After the jobs it has."""
        self._jobs.put(None)
        self._thread.join()
        self.store.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            begin = time.perf_counter()
            try:
                ok, error = self._do(job), self.store.error
            except Exception as problem:  # a store's bug pauses its tier; the engine goes on without it
                log.exception("tier %s: %s of %d blocks", job.tier, job.kind, len(job.keys))
                ok, error = [False] * len(job.keys), f"{type(problem).__name__}: {problem}"
            self._done.put((job.id, ok, time.perf_counter() - begin, error))
            self._wake()

    def _do(self, job: Job) -> list[bool]:
        records = self.arena.records(job.keys, job.slots) if job.slots else []
        if job.kind == READ:
            return self.store.read(job.keys, [record.data for record in records])
        if job.kind == WRITE:
            for key, record, parent, recompute_s in zip(job.keys, records, job.parents, job.costs_s, strict=True):
                self.arena.formats[key_group(key)].describe(record, parent, recompute_s)
            return self.store.write(job.keys, [record.data for record in records])
        if job.kind == DELETE:
            self.store.delete(job.keys)
            return [True] * len(job.keys)
        return self.store.find(job.keys)


class PoolDriver:
    """`stores` by tier name, for every tier of the pool. Events are logged, once each, and kept for `events`.

    `wake`: called in any thread when `poll` has something to give.
    """

    def __init__(
        self, pool: KVPool, arena: Arena, stores: Mapping[str, TierStore], wake: Callable[[], None] = lambda: None
    ) -> None:
        self.pool = pool
        self.threads = {name: StoreThread(name, store, arena, wake) for name, store in stores.items()}
        self._events: list[TierEvent] = []

    def handle(self, source: str, message: ToPool, now: float) -> Answers:
        """What to say to which engine."""
        answers = self.pool.handle(source, message, now)
        self._submit()
        return answers

    def poll(self, now: float) -> Answers:
        """What has happened since: call it often, it does not wait."""
        answers: Answers = []
        for thread in self.threads.values():
            for job_id, ok, seconds, error in thread.poll():
                answers += self.pool.job_done(job_id, ok, seconds, now, error)
        answers += self.pool.tick(now)
        self._submit()
        return answers

    def lost(self, source: str, now: float) -> None:
        """The engine is gone."""
        self.pool.lost(source, now)
        self._submit()

    def events(self) -> list[TierEvent]:
        """New since the last call."""
        new, self._events = self._events, []
        return new

    def close(self) -> None:
        for thread in self.threads.values():
            thread.close()

    def _submit(self) -> None:
        for job in self.pool.jobs():
            self.threads[job.tier].submit(job)
        for event in self.pool.events():
            log.warning("%s", event.text)
            self._events.append(event)
