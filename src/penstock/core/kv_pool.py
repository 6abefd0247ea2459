"""The pool of one machine: which blocks lie in host memory and in the tiers below, who reads them, what moves and goes.

A state machine: `handle(source, message, now)` gives messages, `jobs()` work for the stores, `job_done(...)` takes its
end. Knows keys, slots and seconds; no byte, clock, thread or socket. Several engines share it, each a `source`; so do
other machines' pools, its *peers*. They are served from this machine's own tiers alone, and what they bring or ask for
goes to no shared one: pools that stand in a circle pass nothing on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from penstock.core.eviction import AUTO, Entry, TierIndex
from penstock.core.holds import Hold, Lookup, Promotion, as_known, hold_of
from penstock.core.lower_tier import LowerTier, TierCounts
from penstock.core.tiering import (
    HOST,
    IN_HOST,
    NO_TIER,
    WRITE_BACK,
    WRITE_SELECTIVE,
    WRITE_THROUGH,
    Expired,
    Fetch,
    Fetched,
    Filled,
    Job,
    Match,
    Matched,
    Release,
    Reserve,
    Reserved,
    TierEvent,
    TierSettings,
    ToEngine,
    ToPool,
    key_group,
)

MIN_USES = 2  # of WRITE_SELECTIVE: the request that computed it and one that asked for it
READ, WRITE, DELETE, FIND = "read", "write", "delete", "find"

Answers = list[tuple[str, ToEngine]]  # (source, message)


class KVPool:
    """`record_bytes`: of a block as it is stored, per KV group. `host_blocks`: slots of the arena, per KV group.

    Callers call `handle`, `job_done`, `lost` and, some ten times a second, `tick`; they deliver the messages that these
    give back, and hand what `jobs` gives to the stores, per tier in order.
    """

    def __init__(
        self,
        record_bytes: Sequence[int],
        host_blocks: Sequence[int],
        tiers: Sequence[TierSettings] = (),
        policy: str = AUTO,
        lease_s: float = 120.0,
    ) -> None:
        self.record_bytes = tuple(record_bytes)
        self.host = [TierIndex(n, size, policy) for n, size in zip(host_blocks, record_bytes, strict=True)]
        self.host_counts = TierCounts()
        self.lower = [LowerTier(settings, record_bytes, policy) for settings in tiers]
        self.lease_s = lease_s
        self.peers: set[str] = set()  # sources that are other machines' pools: added by who meets them
        self._holds: dict[tuple[str, int], Hold] = {}
        self._filling: set[bytes] = set()  # keys whose slots engines fill
        self._promotions: dict[bytes, Promotion] = {}
        self._harmful: set[bytes] = set()  # resident and pinned, not to be given out
        self._lookups: dict[int, Lookup] = {}  # by find job
        self._jobs: dict[int, Job] = {}  # given out
        self._new_jobs: list[Job] = []
        self._events: list[TierEvent] = []
        self._next_job = 0
        self._until_write_ahead = [0] * len(self.host)

    # ---- messages ----

    def handle(self, source: str, message: ToPool, now: float) -> Answers:
        """What to say to which engine. Ids count per source; a message for an id that has ended changes nothing."""
        match message:
            case Match():
                answers = self._match(source, message, now)
            case Fetch():
                answers = self._fetch(source, message, now)
            case Reserve():
                answers = self._reserve(source, message, now)
            case Filled():
                answers = self._filled(source, message, now)
            case Release():
                answers = []
                hold = self._holds.pop((source, message.id), None)
                if hold is not None:
                    self._end(hold, harmful=message.failed)
        self._pump(now)
        return answers

    def lost(self, source: str, now: float) -> None:
        """The engine or peer is gone: its pins and reservations end."""
        self.peers.discard(source)
        for hold in [hold for hold in self._holds.values() if hold.source == source]:
            del self._holds[hold.source, hold.id]
            self._end(hold)
        for job_id in [id_ for id_, lookup in self._lookups.items() if lookup.source == source]:
            del self._lookups[job_id]
        self._pump(now)

    def tick(self, now: float) -> Answers:
        """Leases that ended, tiers that are tried again or given up, policies that changed."""
        answers: Answers = []
        for hold in [hold for hold in self._holds.values() if hold.expires_s <= now]:
            del self._holds[hold.source, hold.id]
            self._end(hold)
            answers.append((hold.source, Expired(hold.id)))
        for tier in self.lower:
            self._events += tier.review(now)
        for name, indexes in [(HOST, self.host), *((tier.name, tier.indexes or []) for tier in self.lower)]:
            for index in indexes:
                if (policy := index.choose(now)) is not None:
                    self._events.append(TierEvent(name, "policy", f"tier {name}: evicts by {policy} from now on", now))
        self._pump(now)
        return answers

    def jobs(self) -> list[Job]:
        """New since the last call."""
        new, self._new_jobs = self._new_jobs, []
        return new

    def events(self) -> list[TierEvent]:
        """New since the last call."""
        new, self._events = self._events, []
        return new

    def adopt(self, name: str, records: Iterable[tuple[bytes, bytes, float]], now: float) -> None:
        """What a store found at its start: (key, parent, seconds to recompute). What has no room is deleted."""
        tier = next(tier for tier in self.lower if tier.name == name)
        surplus = tier.adopt(records, now)
        if surplus:
            self._give_out(tier, DELETE, tuple(surplus))

    @property
    def num_held(self) -> int:
        """Fetches and reservations not ended."""
        return len(self._holds)

    # ---- looking up ----

    def _match(self, source: str, message: Match, now: float) -> Answers:
        lookup = Lookup(source, message.id, message.keys, [self._fastest(key, source) for key in message.keys])
        if source in self.peers:
            return [self._matched(lookup)]
        unknown = [key for key, tier in zip(lookup.keys, lookup.tiers, strict=True) if tier == NO_TIER]
        for tier in self.lower:
            tier.worth.used(len(message.keys))
            if unknown and tier.is_on and tier.indexes is None:
                job = self._give_out(tier, FIND, tuple(unknown))
                self._lookups[job.id] = lookup
                lookup.num_jobs += 1
        return [] if lookup.num_jobs else [self._matched(lookup)]

    def _fastest(self, key: bytes, source: str) -> int:
        """The first tier that can serve the source: a peer has none that is shared."""
        if key in self.host[key_group(key)] and key not in self._harmful:
            return IN_HOST
        for t, tier in enumerate(self.lower):
            if tier.is_on and tier.holds(key) and not (tier.is_shared and source in self.peers):
                return IN_HOST + 1 + t
        return NO_TIER

    def _matched(self, lookup: Lookup) -> tuple[str, ToEngine]:
        for found in lookup.tiers:
            if found == IN_HOST:
                self.host_counts.num_found += 1
            elif found != NO_TIER:
                self.lower[found - IN_HOST - 1].counts.num_found += 1
        return lookup.source, Matched(lookup.id, tuple(lookup.tiers), tuple(tier.predict() for tier in self.lower))

    # ---- fetching ----

    def _fetch(self, source: str, message: Fetch, now: float) -> Answers:
        if (source, message.id) in self._holds:
            return []
        is_peer = source in self.peers
        if is_peer:
            message = as_known(message, [self.host, *(tier.indexes for tier in self.lower if tier.indexes is not None)])
        hold = self._holds[source, message.id] = hold_of(source, message, now + self.lease_s)
        touched = []
        for i, (key, recompute_s) in enumerate(zip(hold.keys, hold.costs_s, strict=True)):
            index = self.host[key_group(key)]
            self._follow(key, recompute_s, now)
            entry = index.get(key)
            if entry is not None:
                if key not in self._harmful:
                    index.pin(entry)
                    touched.append(entry)
                    hold.slots[i] = entry.slot
            elif key in self._promotions:
                promotion = self._promotions[key]
                if not (is_peer and self.lower[promotion.tier].is_shared):
                    promotion.waiters.append((hold, i))
                    promotion.is_foreign = promotion.is_foreign and is_peer
                    hold.num_pending += 1
            elif key not in self._filling and (found := self._fastest(key, source)) != NO_TIER:
                slot = self._host_slot(key_group(key))
                if slot is None:
                    break
                promotion = Promotion(
                    key, slot, hold.parents[i], recompute_s, found - IN_HOST - 1, is_peer, [(hold, i)]
                )
                self._promotions[key] = promotion
                self.lower[promotion.tier].queue_read(key, now)
                hold.num_pending += 1
        for entry in reversed(touched):
            self.host[key_group(entry.key)].touch(entry, now)
            if not is_peer:
                self._consider_write(entry)
        return [(source, self._fetched(hold))]

    def _fetched(self, hold: Hold) -> Fetched:
        return Fetched(hold.id, tuple(hold.slots), not hold.num_pending, self.lease_s)

    def _follow(self, key: bytes, recompute_s: float, now: float) -> None:
        group = key_group(key)
        self.host[group].follow(key, recompute_s, now)
        for tier in self.lower:
            if tier.indexes is not None:
                tier.indexes[group].follow(key, recompute_s, now)

    def _host_slot(self, group: int) -> int | None:
        self._write_ahead(group)
        got = self.host[group].reserve()
        return None if got is None else got[0]

    def _write_ahead(self, group: int) -> None:
        """Of WRITE_BACK: what will be evicted next is stored before it goes."""
        index = self.host[group]
        batch = max(4, index.num_slots // 16)
        if index.num_free > batch or not any(tier.settings.write == WRITE_BACK for tier in self.lower):
            return
        self._until_write_ahead[group] -= 1
        if self._until_write_ahead[group] > 0:
            return
        self._until_write_ahead[group] = batch // 2
        for entry in index.next_to_go(batch):
            self._queue_write(entry, WRITE_BACK)

    def _end(self, hold: Hold, harmful: bool = False) -> None:
        """Pins and reserved slots of a hold that is no longer in `_holds`."""
        for i, (key, slot) in enumerate(zip(hold.keys, hold.slots, strict=True)):
            index = self.host[key_group(key)]
            if not slot:
                continue
            if not hold.is_fetch:
                self._filling.discard(key)
                index.give_back(slot)
                continue
            if harmful:
                self._harmful.add(key)
                self.host_counts.num_bad += 1
            self._unpin(key)
            hold.slots[i] = 0
        if hold.num_pending:
            for key in hold.keys:
                if (promotion := self._promotions.get(key)) is not None:
                    promotion.waiters = [waiter for waiter in promotion.waiters if waiter[0] is not hold]
            hold.num_pending = 0

    def _unpin(self, key: bytes) -> None:
        index = self.host[key_group(key)]
        entry = index.entries[key]
        index.unpin(entry)
        if key in self._harmful and not entry.num_pins:
            self._harmful.discard(key)
            index.remove(key)

    # ---- saving ----

    def _reserve(self, source: str, message: Reserve, now: float) -> Answers:
        if (source, message.id) in self._holds:
            return []
        hold = self._holds[source, message.id] = hold_of(source, message, now + self.lease_s)
        for i, key in enumerate(hold.keys):
            group = key_group(key)
            if key in self.host[group] or key in self._filling or key in self._promotions:
                continue
            slot = self._host_slot(group)
            if slot is None:
                break
            hold.slots[i] = slot
            self._filling.add(key)
        if not any(hold.slots):
            del self._holds[source, message.id]
        return [(source, Reserved(message.id, tuple(hold.slots)))]

    def _filled(self, source: str, message: Filled, now: float) -> Answers:
        hold = self._holds.get((source, message.id))
        if hold is None or hold.is_fetch:
            return []
        del self._holds[source, message.id]
        for i in range(len(hold.keys) - 1, -1, -1):  # deepest first: of equally old ones the leaf goes first
            key, slot = hold.keys[i], hold.slots[i]
            if not slot:
                continue
            hold.slots[i] = 0
            self._filling.discard(key)
            if i < len(message.filled) and message.filled[i]:
                self._follow(key, hold.costs_s[i], now)
                self._publish(key, hold.parents[i], slot, hold.costs_s[i], hold.source in self.peers, now)
            else:
                self.host[key_group(key)].give_back(slot)
        return []

    def _publish(self, key: bytes, parent: bytes, slot: int, recompute_s: float, is_foreign: bool, now: float) -> Entry:
        entry = self.host[key_group(key)].publish(key, parent, slot, recompute_s, now)
        entry.is_foreign = is_foreign
        self.host_counts.num_written += 1
        self._reprice(key)
        self._consider_write(entry)
        return entry

    def _reprice(self, key: bytes) -> None:
        """A block that a lower tier has costs its reload, or its recomputation if that is sooner."""
        group = key_group(key)
        entry = self.host[group].get(key)
        if entry is not None:
            reloads = [tier.rate.seconds(entry.num_bytes) for tier in self.lower if tier.is_on and tier.holds(key)]
            self.host[group].set_cost(key, min([entry.recompute_s, *reloads]))

    def _consider_write(self, entry: Entry) -> None:
        self._queue_write(entry, WRITE_THROUGH)
        if entry.num_uses >= MIN_USES:
            self._queue_write(entry, WRITE_SELECTIVE)

    def _queue_write(self, entry: Entry, policy: str) -> None:
        for tier in self.lower:
            stays = entry.is_foreign and tier.is_shared
            if tier.settings.write == policy and tier.takes_writes and not tier.holds(entry.key) and not stays:
                tier.writes[entry.key] = None

    # ---- stores ----

    def _give_out(self, tier: LowerTier, kind: str, keys: tuple[bytes, ...], entries: Sequence[Entry] = ()) -> Job:
        slots = tuple(entry.slot for entry in entries)
        parents = tuple(entry.parent for entry in entries)
        job = Job(self._next_job, tier.name, kind, keys, slots, parents, tuple(entry.recompute_s for entry in entries))
        self._next_job += 1
        self._jobs[job.id] = job
        self._new_jobs.append(job)
        return job

    def _pump(self, now: float) -> None:
        """Give the stores what they have room for, reads first: somebody waits for them."""
        for tier in self.lower:
            while tier.is_working and tier.num_jobs < tier.settings.max_jobs:
                if not self._give_read(tier) and not self._give_write(tier):
                    break
                tier.num_jobs += 1

    def _give_read(self, tier: LowerTier) -> bool:
        keys: list[bytes] = []
        num_bytes = 0
        while tier.reads and num_bytes < tier.settings.batch_bytes:
            key = tier.reads.popleft()
            promotion = self._promotions[key]
            if promotion.waiters:
                keys.append(key)
                num_bytes += self.record_bytes[key_group(key)]
            else:
                tier.unpin(key)
                del self._promotions[key]
                self.host[key_group(key)].give_back(promotion.slot)
        if keys:
            job = self._give_out(tier, READ, tuple(keys))
            slots = tuple(self._promotions[key].slot for key in keys)
            self._jobs[job.id] = self._new_jobs[-1] = replace(job, slots=slots)
        return bool(keys)

    def _give_write(self, tier: LowerTier) -> bool:
        entries: list[Entry] = []
        deleted: list[bytes] = []
        num_bytes = 0
        while tier.writes and num_bytes < tier.settings.batch_bytes:
            key, _ = tier.writes.popitem(last=False)
            index = self.host[key_group(key)]
            entry = index.get(key)
            if entry is None or key in self._harmful or key in tier.writing or tier.holds(key):
                continue
            has_room, victim = tier.make_room(key)
            if not has_room:
                continue
            if victim is not None:
                deleted.append(victim.key)
                self._reprice(victim.key)
            index.pin(entry)
            entries.append(entry)
            num_bytes += entry.num_bytes
        if deleted:
            self._give_out(tier, DELETE, tuple(deleted))
        if entries:
            self._give_out(tier, WRITE, tuple(entry.key for entry in entries), entries)
        return bool(entries)

    def job_done(
        self, job_id: int, ok: Sequence[bool], seconds: float, now: float, error: str | None = None
    ) -> Answers:
        """The store's word: `ok` per key; `error` when it is in trouble as a whole: the tier pauses."""
        job = self._jobs.pop(job_id)
        tier = next(tier for tier in self.lower if tier.name == job.tier)
        is_write = job.kind in (WRITE, DELETE)
        event = tier.worked(is_write, now) if error is None else tier.failed(is_write, error, now)
        if event is not None:
            self._events.append(event)
        answers: Answers = []
        waiting: dict[tuple[str, int], Hold] = {}
        if job.kind == READ:
            tier.num_jobs -= 1
            self._read_done(tier, job, ok, seconds, error, now, waiting)
        elif job.kind == WRITE:
            tier.num_jobs -= 1
            for key, parent, recompute_s, good in zip(job.keys, job.parents, job.costs_s, ok, strict=True):
                tier.written(key, parent, recompute_s, good, seconds / len(job.keys), now)
                self._unpin(key)
                self._reprice(key)
        elif job.kind == FIND:
            answers = self._find_done(tier, job, ok, seconds)
        while not tier.is_working and tier.reads:
            key = tier.reads.popleft()
            tier.unpin(key)
            self._arrived(self._promotions[key], False, now, waiting)
        self._pump(now)
        return answers + [(hold.source, self._fetched(hold)) for hold in waiting.values()]

    def _read_done(
        self,
        tier: LowerTier,
        job: Job,
        ok: Sequence[bool],
        seconds: float,
        error: str | None,
        now: float,
        waiting: dict[tuple[str, int], Hold],
    ) -> None:
        if all(ok):
            tier.rate.observe(sum(self.record_bytes[key_group(key)] for key in job.keys), seconds)
        tier.worth.spent(seconds)
        for key, good in zip(job.keys, ok, strict=True):
            promotion = self._promotions[key]
            tier.unpin(key)
            if good:
                tier.counts.num_read += 1
                tier.worth.saved(promotion.recompute_s if promotion.waiters else 0.0)
            elif error is None:
                tier.counts.num_bad += 1
                tier.forget(key)
            self._arrived(promotion, good, now, waiting)

    def _arrived(self, promotion: Promotion, good: bool, now: float, waiting: dict[tuple[str, int], Hold]) -> None:
        """Its slot is filled, or it is read elsewhere, or it is a miss."""
        key, group = promotion.key, key_group(promotion.key)
        entry, ended = None, promotion.waiters
        engines = [waiter for waiter in ended if waiter[0].source not in self.peers]
        if good:
            del self._promotions[key]
            slot, is_foreign = promotion.slot, promotion.is_foreign
            entry = self._publish(key, promotion.parent, slot, promotion.recompute_s, is_foreign, now)
        elif engines and (found := self._fastest(key, engines[0][0].source)) != NO_TIER:
            ended = [waiter for waiter in ended if waiter[0].source in self.peers]  # they compute it, or ask again
            promotion.tier, promotion.waiters = found - IN_HOST - 1, engines
            self.lower[promotion.tier].queue_read(key, now)
        else:
            del self._promotions[key]
            self.host[group].give_back(promotion.slot)
        for hold, i in ended:
            hold.num_pending -= 1
            waiting[hold.source, hold.id] = hold
            if entry is not None:
                self.host[group].pin(entry)
                hold.slots[i] = entry.slot

    def _find_done(self, tier: LowerTier, job: Job, ok: Sequence[bool], seconds: float) -> Answers:
        tier.worth.spent(seconds)
        for key, good in zip(job.keys, ok, strict=True):
            if good:
                tier.remember(key)
            else:
                tier.known.pop(key, None)
        lookup = self._lookups.pop(job.id, None)
        if lookup is None:
            return []
        lookup.num_jobs -= 1
        if lookup.num_jobs:
            return []
        lookup.tiers = [self._fastest(key, lookup.source) for key in lookup.keys]
        return [self._matched(lookup)]
