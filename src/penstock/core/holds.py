"""What the pool remembers of engines' wishes: slots they may touch, blocks on their way up, lookups not yet answered.

Plain data, written by `KVPool` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from penstock.core.eviction import Entry, TierIndex
from penstock.core.tiering import Fetch, Reserve, key_group


@dataclass(slots=True, eq=False)
class Hold:
    """A fetch or a reservation: slots that an engine may touch until it says so, or its lease ends."""

    source: str
    id: int
    keys: tuple[bytes, ...]
    parents: tuple[bytes, ...]
    costs_s: tuple[float, ...]
    slots: list[int]
    is_fetch: bool
    expires_s: float
    num_pending: int = 0  # blocks still on their way up


def hold_of(source: str, message: Fetch | Reserve, expires_s: float) -> Hold:
    """With no slot yet."""
    fields = (message.keys, message.parents, message.costs_s)
    return Hold(source, message.id, *fields, [0] * len(message.keys), isinstance(message, Fetch), expires_s)


def as_known(message: Fetch, indexes: Sequence[Sequence[TierIndex]]) -> Fetch:
    """A peer does not say what its blocks stand behind and cost: what a pool's own tiers know of them."""

    def entry(key: bytes) -> Entry | None:
        return next((found for tier in indexes if (found := tier[key_group(key)].get(key)) is not None), None)

    found = [entry(key) for key in message.keys]
    parents = tuple(b"" if each is None else each.parent for each in found)
    return replace(message, parents=parents, costs_s=tuple(0.0 if e is None else e.recompute_s for e in found))


@dataclass(slots=True, eq=False)
class Promotion:
    """A block on its way into host memory. Nobody may wait for it any more: then it is dropped if not yet read."""

    key: bytes
    slot: int
    parent: bytes
    recompute_s: float
    tier: int  # where it is read now
    is_foreign: bool = False  # only peers have asked for it
    waiters: list[tuple[Hold, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Lookup:
    """A Match that waits for what shared tiers say."""

    source: str
    id: int
    keys: tuple[bytes, ...]
    tiers: list[int]
    num_jobs: int = 0
