"""The router's index: which engines hold which blocks, in which tier. Fed by events, asked for whole prompts.

It predicts: a wrong entry costs time, never a token. Knows hashes and names of engines; knows no cost and no socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.core.hash_table import HashTable, Keys, Values
from penstock.core.holders import EXPECTED, NUM_TIERS, TIER_BITS, HolderCodes, Holding
from penstock.core.kv_events import TIERS, KVChange, KVEvents, KVSnapshot, SnapshotRequest, tier_factor

EXPECTED_S = 30.0  # what a decision promised is believed so long without an event
ASK_AGAIN_S = 1.0  # a snapshot that does not come is asked for again
BAN_S = 60.0  # how long a liar is not listened to
MAX_LATER = 1000  # batches kept while a snapshot is awaited
EXCESS = 1.25  # an engine may claim so much more than it said it can hold: events of a step come in any order
LOOK = 64  # blocks looked up before it is asked whether the rest can matter
SWEEP_BUCKETS = 4096  # looked through per `tick`, 1 ms, for what engines that are gone held
_MASK = 2**64 - 1


@dataclass(slots=True)
class _Engine:
    """What is known of one engine's stream. `slot` is its number in the codes; a new one whenever it starts afresh."""

    name: str
    row: int
    slot: int
    shared: bool
    max_blocks: int | None
    life: int = -1
    seq: int = -1
    num_blocks: int = 0  # (block, tier) pairs, promised ones not counted
    checksum: int = 0
    asked_s: float | None = None  # when a snapshot was asked for
    banned_until_s: float = float("-inf")
    later: list[KVEvents] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a prompt's beginning each engine can have without computing it.

    `blocks`: of the longest run from the start that the engine, with what is shared, can put together, how many lie
    nearest in a tier, per row; by tier, nearest first, the device always. `num_asked`: blocks that were looked up.
    """

    num_asked: int
    blocks: Mapping[str, NDArray[np.int64]]

    @property
    def total(self) -> NDArray[np.int64]:
        """[rows]"""
        first, *others = self.blocks.values()
        return sum(others, first)


class KVIndex:
    """Feed it with `apply` and `restore`, promise with `expect`, ask with `match`; call `tick` now and then.

    Every engine has a row, as long as it is there; rows of engines that are gone are used again. `num_blocks`: how many
    distinct blocks to be ready for; beyond it the table grows, which stops the world for 0.4 us a block.
    """

    def __init__(self, num_blocks: int = 100_000) -> None:
        self.rows: dict[str, int] = {}
        self.num_gaps = 0
        self.num_divergences = 0
        self.num_refused = 0  # streams cut off because they claimed too much
        self._table = HashTable(num_blocks)
        self._codes = HolderCodes()
        self._engines: dict[str, _Engine] = {}
        self._slot_of_row = np.zeros(0, np.int64)
        self._free_rows: list[int] = []
        self._free_slots: list[int] = []
        self._num_slots = 1  # slot 0 stays empty: vacant rows point to it
        self._live = 0  # bits of slots that count
        self._shared = 0  # those that everybody can read
        self._sweeping: dict[int, int] = {}  # slot of an engine that is gone -> buckets still to look through
        self._cursor = 0
        self._swept_of = 0  # buckets of the table when the cursor was last moved: growing moves every entry
        self._promised: deque[tuple[float, str, int, Keys]] = deque()

    @property
    def num_blocks(self) -> int:
        """Distinct blocks, with those that are not swept out yet."""
        return self._table.num_entries

    @property
    def num_bytes(self) -> int:
        """Of table and codes: an estimate."""
        return self._table.num_bytes + self._codes.num_bytes

    # ---- engines ----

    def add(self, engine: str, *, shared: bool = False, max_blocks: int | None = None) -> int:
        """A new engine, or a pool that every engine reads (`shared`: what it holds counts as tier "remote"). Its row.

        `max_blocks`: (block, tier) pairs it can hold at most; who claims much more is not believed at all.
        """
        assert engine not in self._engines
        row = self._free_rows.pop() if self._free_rows else len(self._slot_of_row)
        if row == len(self._slot_of_row):
            self._slot_of_row = np.append(self._slot_of_row, 0)
        self._engines[engine] = state = _Engine(engine, row, 0, shared, max_blocks)
        self.rows[engine] = row
        self._take_slot(state)
        return row

    def remove(self, engine: str) -> None:
        """The engine is gone, and with it all it held."""
        state = self._engines.pop(engine)
        self._leave_slot(state)
        self._slot_of_row[state.row] = 0
        self._free_rows.append(self.rows.pop(engine))

    def held_by(self, engine: str) -> int:
        """(block, tier) pairs that an engine holds, by its events."""
        return self._engines[engine].num_blocks

    def _take_slot(self, state: _Engine) -> None:
        if self._free_slots:
            state.slot = self._free_slots.pop()
        else:
            state.slot, self._num_slots = self._num_slots, self._num_slots + 1
        self._slot_of_row[state.row] = state.slot
        self._live |= 1 << state.slot
        if state.shared:
            self._shared |= 1 << state.slot

    def _leave_slot(self, state: _Engine) -> None:
        """Nothing of what the engine held counts any more. The entries go when `tick` comes by."""
        self._live &= ~(1 << state.slot)
        self._shared &= ~(1 << state.slot)
        self._sweeping[state.slot] = self._table.num_buckets
        state.num_blocks = state.checksum = 0

    def _start_afresh(self, state: _Engine) -> None:
        self._leave_slot(state)
        self._take_slot(state)

    # ---- what engines say ----

    def apply(self, events: KVEvents, now: float) -> SnapshotRequest | None:
        """Take a batch in. A request is given back when something of this engine was missed or does not add up."""
        state = self._engines.get(events.engine)
        if state is None or now < state.banned_until_s or events.life < state.life:
            return None
        if events.life > state.life:
            if state.life >= 0:
                self._start_afresh(state)
            state.life, state.seq, state.later, state.asked_s = events.life, -1, [], None
        if events.seq <= state.seq:
            return None  # told before
        if state.asked_s is not None:
            self._keep(state, events)
            return None
        if events.seq > state.seq + 1:
            self.num_gaps += 1
            self._keep(state, events)
            return self._ask(state, now)
        return self._follow(state, events, now)

    def restore(self, snapshot: KVSnapshot, now: float) -> SnapshotRequest | None:
        """All that the engine holds takes the place of what was believed; then what came since."""
        state = self._engines.get(snapshot.engine)
        if state is None or now < state.banned_until_s or snapshot.life < state.life:
            return None
        if snapshot.life == state.life and snapshot.seq < state.seq:
            return None  # older than what is known
        self._start_afresh(state)
        if snapshot.life > state.life:
            state.later = []
        state.life, state.seq, state.asked_s = snapshot.life, snapshot.seq, None
        for tier, hashes in snapshot.blocks:
            self._change(state, keys_of(hashes), tier, True)
        if state.checksum != snapshot.checksum or self._claims_too_much(state):
            self._ban(state, now)
            return None
        later, state.later = sorted(state.later, key=lambda events: events.seq), []
        asked = None
        for n, events in enumerate(later):
            if events.seq <= state.seq:
                continue
            if events.seq > state.seq + 1:
                self.num_gaps += 1
                state.later = later[n:]
                return self._ask(state, now)
            asked = self._follow(state, events, now)
            if asked is not None:
                state.later = later[n + 1 :]
                return asked
        return asked

    def _follow(self, state: _Engine, events: KVEvents, now: float) -> SnapshotRequest | None:
        state.seq = events.seq
        for change in events.changes:
            self._apply_change(state, change)
        if self._claims_too_much(state):
            self._ban(state, now)
            return None
        if events.checksum is not None and events.checksum != state.checksum:
            self.num_divergences += 1
            return self._ask(state, now)
        return None

    def _apply_change(self, state: _Engine, change: KVChange) -> None:
        if change.hashes:
            self._change(state, keys_of(change.hashes), change.tier, change.stored)
        elif not change.stored:
            self._clear(state, change.tier)

    def _clear(self, state: _Engine, tier: str) -> None:
        """Rare, so everything is looked through."""
        table, bit = self._table, TIER_BITS[tier]
        held = self._codes.holding(table.values.ravel(), state.slot, bit)
        keys = table.keys.ravel()[held]
        spilled = [key for key, value in table.spilled.items() if self._codes.tiers_at(value, state.slot) & bit]
        self._change(state, np.concatenate([keys, np.array(spilled, np.uint64)]), tier, False)

    def _change(self, state: _Engine, keys: Keys, tier: str, stored: bool) -> None:
        """Set or clear a tier's bit, and with it the promise."""
        if not len(keys):
            return
        if state.shared:
            tier = "remote"
        bit = TIER_BITS[tier]
        clear = EXPECTED if stored else bit | EXPECTED
        changed = self._rewrite(state.slot, keys, bit if stored else 0, clear, bit)
        sum_ = int(changed.sum(dtype=np.uint64)) * tier_factor(tier)
        if stored:
            state.checksum = (state.checksum + sum_) & _MASK
            state.num_blocks += len(changed)
        else:
            state.checksum = (state.checksum - sum_) & _MASK
            state.num_blocks -= len(changed)

    def _rewrite(self, slot: int, keys: Keys, set_bits: int, clear_bits: int, watched: int) -> Keys:
        """Change the bits of a slot at some keys; those keys whose `watched` bit has changed."""
        if len(keys) > 1:
            keys = np.unique(keys)
        old = self._table.get(keys)
        distinct, inverse = np.unique(old, return_inverse=True)
        counts = np.bincount(inverse)
        new = np.zeros(len(distinct), np.uint32)
        flipped = np.zeros(len(distinct), bool)
        for n, (value, count) in enumerate(zip(distinct.tolist(), counts.tolist(), strict=True)):
            code = self._codes.changed(value, slot, set_bits, clear_bits)
            flipped[n] = (self._codes.tiers_at(value, slot) ^ self._codes.tiers_at(code, slot)) & watched
            self._codes.count(code, count)
            self._codes.count(value, -count)
            new[n] = code
        moved = (new != distinct)[inverse]
        if moved.any():
            self._table.put(keys[moved], new[inverse][moved])
        return keys[flipped[inverse]]

    def _claims_too_much(self, state: _Engine) -> bool:
        return state.max_blocks is not None and state.num_blocks > EXCESS * state.max_blocks

    def _ban(self, state: _Engine, now: float) -> None:
        """It says what cannot be: nothing it said counts, and it is asked anew after a while."""
        self.num_refused += 1
        self._start_afresh(state)
        state.banned_until_s, state.asked_s, state.later = now + BAN_S, now + BAN_S, []

    def _keep(self, state: _Engine, events: KVEvents) -> None:
        if len(state.later) >= MAX_LATER:
            state.later.clear()  # the snapshot will say what they said, or there is a gap again
        state.later.append(events)

    def _ask(self, state: _Engine, now: float) -> SnapshotRequest:
        state.asked_s = now
        return SnapshotRequest(state.name)

    # ---- what decisions promise ----

    def expect(self, engine: str, hashes: Sequence[bytes], now: float, lasts_s: float = EXPECTED_S) -> None:
        """The engine was given a prompt: it will hold these blocks on its device soon. Its events correct this."""
        state = self._engines[engine]
        if not hashes or state.shared:
            return
        keys = keys_of(hashes)
        self._rewrite(state.slot, keys, EXPECTED, 0, 0)
        self._promised.append((now + lasts_s, engine, state.slot, keys))

    def tick(self, now: float) -> list[SnapshotRequest]:
        """Drop old promises, sweep out a little of what is gone, ask again for what did not come."""
        while self._promised and self._promised[0][0] <= now:
            _, engine, slot, keys = self._promised.popleft()
            state = self._engines.get(engine)
            if state is not None and state.slot == slot:
                self._rewrite(slot, keys, 0, EXPECTED, 0)
        if self._sweeping:
            self._sweep(SWEEP_BUCKETS)
        late = [s for s in self._engines.values() if s.asked_s is not None and now >= s.asked_s + ASK_AGAIN_S]
        return [self._ask(state, now) for state in late]

    def _sweep(self, num_buckets: int) -> None:
        """Take the slots of the gone out of some buckets; a slot that is out of all of them can be given again."""
        table, gone = self._table, sum(1 << slot for slot in self._sweeping)
        if self._swept_of != table.num_buckets:
            self._cursor, self._swept_of = 0, table.num_buckets
            self._sweeping = dict.fromkeys(self._sweeping, table.num_buckets)
        start = self._cursor
        end = min(start + num_buckets, table.num_buckets)
        self._take_out(table.keys[start:end].ravel(), table.values[start:end].ravel(), gone)
        self._cursor = end % table.num_buckets
        for slot in list(self._sweeping):
            self._sweeping[slot] -= end - start
            if self._sweeping[slot] <= 0:
                self._take_out(
                    np.array(list(table.spilled), np.uint64), np.array(list(table.spilled.values()), np.uint32), gone
                )
                del self._sweeping[slot]
                self._free_slots.append(slot)

    def _take_out(self, keys: Keys, values: Values, gone: int) -> None:
        distinct, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        new = distinct.copy()
        for n, (value, count) in enumerate(zip(distinct.tolist(), counts.tolist(), strict=True)):
            code = self._codes.without(value, gone)
            if code != value:
                self._codes.count(code, count)
                self._codes.count(value, -count)
                new[n] = code
        moved = (new != distinct)[inverse]
        if moved.any():
            self._table.put(keys[moved], new[inverse][moved])

    # ---- what routers ask ----

    def match(self, hashes: Sequence[bytes]) -> Match:
        """How far each engine can go into a prompt whose block hashes, in order, are these."""
        blocks: list[NDArray[np.int64] | None] = [np.zeros(self._num_slots, np.int64)] + [None] * (NUM_TIERS - 1)
        if hashes:
            values = self._table.get(keys_of(hashes[:LOOK]))
            if len(hashes) > LOOK and values.all():  # most prompts part from what is held early
                values = np.concatenate([values, self._table.get(keys_of(hashes[LOOK:]))])
            lasts = [*(values[1:] != values[:-1]).nonzero()[0].tolist(), len(values) - 1]  # of runs of equal holders
            alive, start = self._live & ~self._shared, 0
            for last, value in zip(lasts, values[lasts].tolist(), strict=True):
                alive = self._reach(value, last + 1 - start, alive, blocks) if value else 0
                if not alive:
                    break
                start = last + 1
        rows = self._slot_of_row
        found = {tier: each.take(rows) for tier, each in zip(TIERS, blocks, strict=True) if each is not None}
        return Match(len(hashes), found)

    def _reach(self, value: int, num_blocks: int, alive: int, blocks: list[NDArray[np.int64] | None]) -> int:
        """Count a run of blocks with equal holders for those who came so far; who comes further."""
        left, reached, tiers = alive, 0, self._codes.masks(value)
        for tier, mask in enumerate(tiers):
            near = mask & left
            if near:
                self._add(near, num_blocks, blocks, tier)
                left &= ~near
                reached |= near
        if left and any(mask & self._shared for mask in tiers):
            self._add(left, num_blocks, blocks, NUM_TIERS - 1)
            reached = alive
        return reached

    def _add(self, mask: int, num_blocks: int, blocks: list[NDArray[np.int64] | None], tier: int) -> None:
        counts = blocks[tier]
        if counts is None:
            counts = blocks[tier] = np.zeros(self._num_slots, np.int64)
        if mask & (mask - 1) == 0:
            counts[mask.bit_length() - 1] += num_blocks
            return
        num_bytes = (self._num_slots + 7) // 8
        bits = np.unpackbits(np.frombuffer(mask.to_bytes(num_bytes, "little"), np.uint8), bitorder="little")
        counts += bits[: self._num_slots] * np.int64(num_blocks)

    def holders(self, hash_: bytes) -> dict[str, tuple[str, ...]]:
        """Who holds a block, in which tiers, promises not counted."""
        value = int(self._table.get(keys_of([hash_]))[0])
        found = {}
        for state in self._engines.values():
            tiers = self._codes.tiers_at(value, state.slot)
            names = tuple(tier for tier, bit in TIER_BITS.items() if tiers & bit)
            if names:
                found[state.name] = names
        return found

    def holdings(self, engine: str) -> list[Holding]:
        """(key, tier bits) of all that an engine holds. Looks through everything: for tests and for a second router."""
        slot = self._engines[engine].slot
        entries = list(zip(self._table.keys.ravel().tolist(), self._table.values.ravel().tolist(), strict=True))
        entries += self._table.spilled.items()
        held = ((key, self._codes.tiers_at(value, slot) & ~EXPECTED) for key, value in entries if value)
        return [Holding(key, tiers) for key, tiers in held if tiers]


def keys_of(hashes: Sequence[bytes]) -> Keys:
    """The first 8 bytes of each 16-byte hash as a number, never 0. Two of 10 million fall together once in 370,000."""
    joined = b"".join(hashes)
    assert len(joined) == 16 * len(hashes)
    keys = np.frombuffer(joined, "<u8")[::2].astype(np.uint64)
    keys[keys == 0] = 1
    return keys
