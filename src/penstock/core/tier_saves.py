"""An engine's blocks on their way into host memory: which are saved by the write policy, and what became of it.

The saving half of `tier_client.py`. Knows hashes, slots and seconds; which device block a hash is in, the caller finds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from penstock.config.model import KVLayout
from penstock.core.moves import DEVICE, MoveResult, Place
from penstock.core.tier_costs import PrefillRate, TierWorth
from penstock.core.tiering import (
    HOST,
    WRITE_SELECTIVE,
    WRITE_THROUGH,
    ClientSettings,
    Filled,
    Release,
    Reserve,
    Reserved,
    ToPool,
    block_key,
)

MAX_SEEN = 1 << 17  # hashes whose requests are counted
MIN_USES = 2  # of WRITE_SELECTIVE
ANSWER_S = 2.0  # for the pool to answer a reservation: without, it is held to be lost, question or pool
MAX_SAVE_BLOCKS = 64  # of one reservation


@dataclass(frozen=True, slots=True)
class Save:
    """Blocks that have got slots: `(hash, KV group, slot)`, in the order of the prompt."""

    id: int
    items: tuple[tuple[bytes, int, int], ...]

    def places(self, find: Callable[[int, bytes], int], num_groups: int) -> tuple[Place, Place, tuple[int, ...]] | None:
        """Source, destination and which items: those that `find(group, hash)` still knows on the device (0: not)."""
        chosen = tuple(i for i, (hash_, group, _) in enumerate(self.items) if find(group, hash_))
        if not chosen:
            return None
        by_group = [[self.items[i] for i in chosen if self.items[i][1] == g] for g in range(num_groups)]
        src = tuple(tuple(find(g, hash_) for hash_, g, _ in items) for items in by_group)
        slots = tuple(tuple(slot for _, _, slot in items) for items in by_group)
        keys = tuple(block_key(hash_, g) for items in by_group for hash_, g, _ in items)
        return Place(DEVICE, src), Place(HOST, slots, keys), chosen


@dataclass(slots=True, eq=False)
class _Reservation:
    items: list[tuple[bytes, int]]  # hash, group
    save_of: tuple[int, ...] = ()  # its items' indices here
    move_indices: tuple[int, ...] = ()
    until_s: float | None = None  # when the answer is no longer awaited; None: not yet looked at


class TierSaves:
    """Written through: at once. Selective: when a second request has asked for the block. Back: when it is cooling."""

    def __init__(self, layout: KVLayout, settings: ClientSettings, prefill: PrefillRate, worth: TierWorth) -> None:
        self.layout = layout
        self.settings = settings
        self.prefill = prefill
        self.worth = worth
        self.num_saved = 0  # blocks, counted per KV group
        self.num_bytes = 0
        total = sum(g.block_bytes for g in layout.groups)
        self._share = [g.block_bytes / total for g in layout.groups]
        self._save_blocks = min(MAX_SAVE_BLOCKS, max(1, settings.save_bytes // total))
        self._reservations: dict[int, _Reservation] = {}
        self._save_moves: dict[int, int] = {}  # move id -> reservation id
        self._queued: OrderedDict[bytes, tuple[bytes | None, int]] = OrderedDict()  # to be saved: parent, depth
        self._unsaved: OrderedDict[bytes, tuple[bytes | None, int]] = OrderedDict()  # published, not to be saved yet
        self._num_seen: OrderedDict[bytes, int] = OrderedDict()  # requests per hash
        self._ready: list[Save] = []
        self._outbox: list[ToPool] = []
        self._next_id = 1

    def published(self, hash_: bytes, parent: bytes | None, depth: int) -> None:
        """A block, the `depth`-th of its prompt, can be found on the device from now on."""
        if not self.worth.is_on:
            return
        write = self.settings.write
        if write == WRITE_THROUGH or (write == WRITE_SELECTIVE and self._num_seen.get(hash_, 0) >= MIN_USES):
            self._queue(hash_, parent, depth)
        else:
            self._unsaved[hash_] = parent, depth
            if len(self._unsaved) > MAX_SEEN:
                self._unsaved.popitem(last=False)

    def cooling(self, hashes: Iterable[bytes]) -> None:
        """Of write-back: these are next to leave the device."""
        for hash_ in hashes:
            if (known := self._unsaved.pop(hash_, None)) is not None:
                self._queue(hash_, *known)

    def ready(self) -> list[Save]:
        """Saves that may start, new since the last call."""
        new, self._ready = self._ready, []
        return new

    def started(self, save: Save, move_id: int, indices: Sequence[int]) -> None:
        """The move carries these items of it."""
        self._save_moves[move_id] = save.id
        if save.id in self._reservations:
            self._reservations[save.id].move_indices = tuple(indices)

    def dropped(self, save: Save) -> None:
        if self._reservations.pop(save.id, None) is not None:
            self._outbox.append(Release(save.id))

    def asked_for(self, hashes: Sequence[bytes]) -> None:
        """By a request that has come."""
        if self.settings.write != WRITE_SELECTIVE:
            return
        for hash_ in hashes:
            count = self._num_seen[hash_] = self._num_seen.get(hash_, 0) + 1
            self._num_seen.move_to_end(hash_)
            if count >= MIN_USES and (known := self._unsaved.pop(hash_, None)) is not None:
                self._queue(hash_, *known)
        while len(self._num_seen) > MAX_SEEN:
            self._num_seen.popitem(last=False)

    def _queue(self, hash_: bytes, parent: bytes | None, depth: int) -> None:
        if self.worth.is_on and len(self._queued) < self.settings.max_queued:
            self._queued[hash_] = parent, depth

    def parent_key(self, parent: bytes | None, group: int) -> bytes:
        """Window groups have none: there the early blocks may go before the late ones."""
        window = self.layout.groups[group].window
        return b"" if parent is None or window is not None else block_key(parent, group)

    def _reserve(self) -> None:
        items: list[tuple[bytes, int]] = []
        parents: list[bytes] = []
        costs_s: list[float] = []
        for _ in range(min(self._save_blocks, len(self._queued))):
            hash_, (parent, depth) = self._queued.popitem(last=False)
            for g in range(len(self.layout.groups)):
                items.append((hash_, g))
                parents.append(self.parent_key(parent, g))
                costs_s.append(self.cost_s(depth, g))
        id_, self._next_id = self._next_id, self._next_id + 2  # even ones are the fetches'
        self._reservations[id_] = _Reservation(items)
        keys = tuple(block_key(hash_, g) for hash_, g in items)
        self.worth.used(len(items) // len(self.layout.groups))
        self._outbox.append(Reserve(id_, keys, tuple(parents), tuple(costs_s)))

    def reserved(self, message: Reserved) -> None:
        """The pool's answer."""
        reservation = self._reservations.get(message.id)
        if reservation is None:
            self._outbox.append(Release(message.id))  # it came too late
            return
        given = tuple(i for i, slot in enumerate(message.slots) if slot)
        if not given:
            del self._reservations[message.id]
            return
        reservation.save_of = given
        items = tuple((*reservation.items[i], message.slots[i]) for i in given)
        self._ready.append(Save(message.id, items))

    def moved(self, result: MoveResult) -> None:
        """How a move ended; those that are no saves are ignored."""
        save_id = self._save_moves.pop(result.id, None)
        if save_id is None:
            return
        reservation = self._reservations.pop(save_id, None)
        self.worth.spent(result.seconds)
        if reservation is None:
            return
        carried = {reservation.save_of[i] for i in reservation.move_indices} if result.error is None else set()
        self._outbox.append(Filled(save_id, tuple(i in carried for i in range(len(reservation.items)))))
        self.num_saved += len(carried)
        self.num_bytes += result.num_bytes

    def messages(self) -> list[ToPool]:
        """For the pool, new since the last call."""
        while self._queued and len(self._reservations) < self.settings.max_saves:
            self._reserve()
        new, self._outbox = self._outbox, []
        return new

    def tick(self, now: float) -> None:
        """Give up reservations that are not answered: the pool may have died."""
        for id_, reservation in list(self._reservations.items()):
            if reservation.until_s is None:
                reservation.until_s = now + ANSWER_S
            elif now >= reservation.until_s and not reservation.save_of:
                del self._reservations[id_]
                self._outbox.append(Release(id_))

    def expired(self, id_: int) -> None:
        """The pool has given the slots of a reservation to others."""
        if self._reservations.pop(id_, None) is not None:
            self._ready = [save for save in self._ready if save.id != id_]

    def stop(self) -> None:
        """Save nothing of what is queued."""
        self._queued.clear()

    def pool_lost(self) -> None:
        self._reservations.clear()
        self._ready.clear()
        self._outbox.clear()

    @property
    def num_open(self) -> int:
        """Reservations for which the pool may hold slots."""
        return len(self._reservations)

    def cost_s(self, depth: int, group: int) -> float:
        """Seconds to recompute a block, its group's share of them."""
        size = self.layout.block_size
        return self.prefill.seconds(depth * size, (depth + 1) * size) * self._share[group]
