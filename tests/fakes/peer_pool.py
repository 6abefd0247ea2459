"""Another machine's pool on virtual time, at the door of a pretended one: it takes blocks, and brings them back later.

As a real one it copies a slot after it was told of it, checks what it has copied, and fills slots long before its lease
is over. It is late, gives up half-way and dies now and then.
"""

from __future__ import annotations

from typing import Any

from penstock.core.tiering import Expired, Fetch, Fetched, Filled, Release, Reserve, Reserved, ToEngine, key_group

PEER = "another machine"


class PretendedPeer:
    """`kept`: key -> record, what it has taken so far. `pool`: a PretendedPool; it acts until `until_s`."""

    def __init__(self, pool: Any, random: Any, kept: dict[bytes, Any], until_s: float) -> None:
        self.pool, self.random, self.kept, self.until_s = pool, random, kept, until_s
        self.num_taken = self.num_brought = 0
        self._asked: dict[int, tuple[bytes, ...]] = {}
        self._id = 0
        self._life = 0
        pool.pool.peers.add(PEER)
        pool.clock.call_in(0.01, self._beat)

    @property
    def _may_act(self) -> bool:
        return bool(self.pool.alive and self.pool.clock.now() >= self.pool.stopped_until_s)

    def _beat(self) -> None:
        now = self.pool.clock.now()
        if not self.pool.alive or now > self.until_s:
            return
        if self._may_act:
            draw = self.random.random()
            if draw < 0.05:
                self._die(now)
            elif draw < 0.5:
                self._ask(Fetch, self._known())
            elif self.kept:
                self._ask(Reserve, sorted(self.kept))
        self.pool.clock.call_in(0.02 * self.random.random(), self._beat)

    def _die(self, now: float) -> None:
        self._life += 1
        self._asked.clear()
        self.pool.pool.lost(PEER, now)
        self.pool.pool.peers.add(PEER)

    def _known(self) -> list[bytes]:
        tiers = [self.pool.pool.host, *(tier.indexes or [] for tier in self.pool.pool.lower)]
        return sorted({key for tier in tiers for index in tier for key in index.entries})

    def _ask(self, wish: type[Fetch] | type[Reserve], keys: list[bytes]) -> None:
        chosen = tuple(self.random.sample(keys, min(len(keys), self.random.randrange(1, 6))))
        if chosen:
            self._id += 1
            self._asked[self._id] = chosen
            brings = wish is Reserve
            parents = tuple(self.kept[key][1] for key in chosen) if brings else (b"",) * len(chosen)
            self.pool.handle(PEER, wish(self._id, chosen, parents, (0.01 if brings else 0.0,) * len(chosen)))

    def hear(self, answer: ToEngine) -> None:
        """What the pool says."""
        if isinstance(answer, Expired):
            self._asked.pop(answer.id, None)
            return
        assert isinstance(answer, Fetched | Reserved)
        if answer.id in self._asked and not (isinstance(answer, Fetched) and not answer.final):
            lease_s, life = self.pool.faults.lease_s, self._life
            late = 2.0 if isinstance(answer, Fetched) else 0.4  # shares of a lease
            end_s = self.pool.clock.now() + 0.4 * lease_s
            act = self._take if isinstance(answer, Fetched) else self._bring
            self.pool.clock.call_in(
                late * lease_s * self.random.random() ** 3, lambda: life == self._life and act(answer, end_s)
            )

    def _take(self, answer: Fetched, end_s: float) -> None:
        keys = self._asked.pop(answer.id, ())
        if not self.pool.alive:
            return
        for key, slot in zip(keys, answer.slots, strict=bool(keys)):
            record = self.pool.slots.get((key_group(key), slot))
            if slot and record is not None and record.holds(key):  # a reader checks
                entry = self.pool.pool.host[key_group(key)].get(key)
                self.kept[key] = record, b"" if entry is None else entry.parent
                self.num_taken += 1
        self.pool.handle(PEER, Release(answer.id))

    def _bring(self, answer: Reserved, end_s: float) -> None:
        keys = self._asked.pop(answer.id, ())
        if not self._may_act or self.pool.clock.now() > end_s or not keys:
            return  # its connection is given up
        filled = []
        for key, slot in zip(keys, answer.slots, strict=True):
            filled.append(bool(slot) and self.random.random() < 0.9)
            if filled[-1]:
                self.pool.slots[key_group(key), slot] = self.kept[key][0]
                self.num_brought += 1
        self.pool.handle(PEER, Filled(answer.id, tuple(filled)))
