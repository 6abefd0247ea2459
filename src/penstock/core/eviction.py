"""What a tier keeps of one KV group, and what goes for new blocks: of the leaves of the prefix tree those worth least.

`TierIndex` counts slots and knows keys, parents, pins and uses; policies score entries behind one door; `PolicyChoice`
runs each policy on a sample of the keys and names the one that saves most. Knows no byte, no store and no request.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

HEAT_HALF_LIFE_S = 600.0
SAMPLE = 16  # one key of so many is followed by the ghost lists
MIN_GHOSTS = 8
AUTO = "auto"


@dataclass(slots=True, eq=False)
class Entry:
    """A resident block. Written by its index, `spent_s` and `is_foreign` by the pool."""

    key: bytes
    parent: bytes  # key of the block before it in the same group, b"" for none
    slot: int
    num_bytes: int
    recompute_s: float
    cost_s: float  # what it costs to have it again: computing it, or reading it from a lower tier
    num_pins: int = 0
    num_uses: int = 0  # requests that asked for it, the one that computed it included
    heat: float = 0.0  # uses, halved every HEAT_HALF_LIFE_S
    heat_s: float = 0.0  # when `heat` was true
    last_use: int = 0  # of the index's counter
    score: float = 0.0  # of its policy, at its last use
    spent_s: float = 0.0  # seconds of its tier's store that it took
    is_foreign: bool = False  # other machines alone have brought it or asked for it: it goes to no tier that is shared


class EvictionPolicy(Protocol):
    """The entry with the least score goes first. `age`: the score of the entry that went last, which never falls."""

    def score(self, entry: Entry, age: float) -> float: ...


class LeastRecentlyUsed:
    """What was used longest ago goes."""

    def score(self, entry: Entry, age: float) -> float:
        return float(entry.last_use)


class AgedFrequency:
    """What was used least goes, and what came in late stands as high as what went: LFU-DA (Arlitt et al. 2000)."""

    def score(self, entry: Entry, age: float) -> float:
        return age + entry.heat


class CostAware:
    """Heat times the milliseconds to have it again, per megabyte, aged likewise: GDSF (Cherkasova 1998)."""

    def score(self, entry: Entry, age: float) -> float:
        return age + entry.heat * entry.cost_s * 1e9 / entry.num_bytes


POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {
    "gdsf": CostAware,
    "lfu": AgedFrequency,
    "lru": LeastRecentlyUsed,
}


class TierIndex:
    """`num_slots` slots of one size, numbered from 1. Each is free, reserved (given out, not published) or resident.

    Eviction is leaf-first: an entry with a resident child, or a pin, stays. A child may come before its parent, or
    without it (its parent may be in another tier); no eviction ever takes a parent away from a resident child.
    `policy`: a name in POLICIES, or AUTO, which begins with "gdsf" and follows PolicyChoice.
    """

    def __init__(self, num_slots: int, num_bytes: int, policy: str = AUTO) -> None:
        self.num_slots = num_slots
        self.num_bytes = num_bytes  # of a block
        self.choice = PolicyChoice(num_slots, num_bytes) if policy == AUTO else None
        self.policy_name = "gdsf" if policy == AUTO else policy
        self.policy = POLICIES[self.policy_name]()
        self.entries: dict[bytes, Entry] = {}
        self.listener: Callable[[bytes, bool], None] | None = None  # told of keys that come (True) and go
        self.num_evicted = 0
        self.age = 0.0
        self._free = list(range(num_slots, 0, -1))
        self._num_children: dict[bytes, int] = {}  # resident children by key of their parent, resident or not
        self._heap: list[tuple[float, int, bytes]] = []  # (score, last_use, key); checked when popped
        self._uses = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self.entries

    def get(self, key: bytes) -> Entry | None:
        return self.entries.get(key)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_reserved(self) -> int:
        return self.num_slots - len(self._free) - len(self.entries)

    # ---- slots ----

    def reserve(self) -> tuple[int, Entry | None] | None:
        """A slot for a new block, and the entry that went for it; None when everything is pinned or reserved."""
        if self._free:
            return self._free.pop(), None
        victim = self._pop_victim()
        if victim is None:
            return None
        self.age = max(self.age, victim.score) if self.policy_name != "lru" else 0.0
        self.num_evicted += 1
        self._drop(victim)
        return victim.slot, victim

    def give_back(self, slot: int) -> None:
        """A reserved slot that holds nothing after all."""
        self._free.append(slot)

    def publish(self, key: bytes, parent: bytes, slot: int, recompute_s: float, now: float) -> Entry:
        """A reserved slot holds this block now."""
        assert key not in self.entries
        entry = Entry(key, parent, slot, self.num_bytes, recompute_s, recompute_s, heat_s=now)
        self.entries[key] = entry
        if parent:
            self._num_children[parent] = self._num_children.get(parent, 0) + 1
        self.touch(entry, now)
        if self.listener is not None:
            self.listener(key, True)
        return entry

    def remove(self, key: bytes) -> Entry | None:
        """The block is gone or was harmful. It must have no pin; children stay."""
        entry = self.entries.get(key)
        if entry is not None:
            assert not entry.num_pins
            self._drop(entry)
            self._free.append(entry.slot)
        return entry

    def coldest(self, count: int) -> list[Entry]:
        """The entries that would go next, first one first, of those that are leaves now."""
        found: list[Entry] = []
        while len(found) < count and (entry := self._pop_victim()) is not None:
            found.append(entry)
        for entry in found:
            self._push(entry)
        return found

    def next_to_go(self, count: int) -> list[Entry]:
        """`coldest`, and what stands before them, which are leaves after them: of both together twice as many."""
        found: list[Entry] = []
        for leaf in self.coldest(count):
            entry: Entry | None = leaf
            while entry is not None and len(found) < 2 * count:
                found.append(entry)
                entry = self.get(entry.parent)
        return found

    # ---- uses ----

    def touch(self, entry: Entry, now: float) -> None:
        """One more request asked for it. Of a chain touch the deepest first: of equals the parent stays longer."""
        self._uses += 1
        entry.last_use = self._uses
        entry.num_uses += 1
        entry.heat = entry.heat * 0.5 ** (max(0.0, now - entry.heat_s) / HEAT_HALF_LIFE_S) + 1.0
        entry.heat_s = now
        self._rescore(entry)

    def pin(self, entry: Entry) -> None:
        entry.num_pins += 1

    def unpin(self, entry: Entry) -> None:
        assert entry.num_pins > 0
        entry.num_pins -= 1
        self._push(entry)

    def set_cost(self, key: bytes, cost_s: float) -> None:
        """A lower tier has got a copy of the block, or has lost it."""
        entry = self.entries.get(key)
        if entry is not None and entry.cost_s != cost_s:
            entry.cost_s = cost_s
            self._rescore(entry)

    def follow(self, key: bytes, cost_s: float, now: float) -> None:
        """A request asked for this block, found or not: the ghost lists learn from it."""
        if self.choice is not None:
            self.choice.follow(key, cost_s, now)

    def choose(self, now: float) -> str | None:
        """Another policy's name when the ghost lists say that it is better; it is in force from then on."""
        name = None if self.choice is None else self.choice.best(self.policy_name, now)
        if name is None:
            return None
        self.policy_name, self.policy = name, POLICIES[name]()
        self.age = 0.0
        self._heap.clear()
        for entry in self.entries.values():
            self._rescore(entry)
        return name

    # ---- inside ----

    def _is_victim(self, entry: Entry) -> bool:
        return not entry.num_pins and entry.key not in self._num_children

    def _rescore(self, entry: Entry) -> None:
        entry.score = self.policy.score(entry, self.age)
        self._push(entry)

    def _push(self, entry: Entry) -> None:
        if self._is_victim(entry):
            heapq.heappush(self._heap, (entry.score, entry.last_use, entry.key))
            if len(self._heap) > 4 * self.num_slots + 64:  # mostly entries that were used again since
                self._heap = [(e.score, e.last_use, e.key) for e in self.entries.values() if self._is_victim(e)]
                heapq.heapify(self._heap)

    def _pop_victim(self) -> Entry | None:
        while self._heap:
            score, last_use, key = heapq.heappop(self._heap)
            entry = self.entries.get(key)
            if entry is not None and entry.score == score and entry.last_use == last_use and self._is_victim(entry):
                while self._heap and self._heap[0] == (score, last_use, key):  # pushed twice: by a pin's end
                    heapq.heappop(self._heap)
                return entry
        return None

    def _drop(self, entry: Entry) -> None:
        del self.entries[entry.key]
        if self.listener is not None:
            self.listener(entry.key, False)
        if entry.parent:
            left = self._num_children[entry.parent] - 1
            if left:
                self._num_children[entry.parent] = left
            else:
                del self._num_children[entry.parent]
                if (parent := self.entries.get(entry.parent)) is not None:
                    self._push(parent)


class PolicyChoice:
    """Ghost lists: every policy keeps house over 1/16 of the keys, in 1/16 of the room; which saves most seconds?

    Keys are sampled by hash, as in SHARDS (Waldspurger et al. 2015), so a ghost list sees single blocks of a chain and
    not its tree. A window ends after `window_s` and `min_samples` uses; a policy takes over when it saved `margin`
    times what the present one did: near-ties change nothing.
    """

    def __init__(
        self, num_slots: int, num_bytes: int, window_s: float = 300.0, min_samples: int = 256, margin: float = 1.05
    ) -> None:
        size = max(MIN_GHOSTS, num_slots // SAMPLE)
        self.ghosts = {name: TierIndex(size, num_bytes, name) for name in POLICIES}
        self.saved_s = dict.fromkeys(POLICIES, 0.0)  # in this window
        self.window_s, self.min_samples, self.margin = window_s, min_samples, margin
        self._num_samples = 0
        self._since_s: float | None = None

    def follow(self, key: bytes, cost_s: float, now: float) -> None:
        if int.from_bytes(key[:4], "little") % SAMPLE:
            return
        self._num_samples += 1
        for name, ghost in self.ghosts.items():
            entry = ghost.get(key)
            if entry is not None:
                self.saved_s[name] += cost_s
                ghost.touch(entry, now)
            else:
                slot, _ = ghost.reserve() or (0, None)  # nothing is ever pinned here
                ghost.publish(key, b"", slot, cost_s, now)

    def best(self, present: str, now: float) -> str | None:
        """At the end of a window the policy to change to, or None."""
        if self._since_s is None:
            self._since_s = now
        if now - self._since_s < self.window_s or self._num_samples < self.min_samples:
            return None
        name = max(self.saved_s, key=lambda name: self.saved_s[name])  # all have equally many bytes
        better = self.saved_s[name] > self.margin * self.saved_s[present]
        self.saved_s = dict.fromkeys(POLICIES, 0.0)
        self._num_samples, self._since_s = 0, now
        return name if better else None
