"""What the pool remembers of engines' wishes: slots they may touch, blocks on their way up, lookups not yet answered.

Plain data, written by `KVPool` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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


@dataclass(slots=True, eq=False)
class Promotion:
    """A block on its way into host memory. Nobody may wait for it any more: then it is dropped if not yet read."""

    key: bytes
    slot: int
    parent: bytes
    recompute_s: float
    tier: int  # where it is read now
    waiters: list[tuple[Hold, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Lookup:
    """A Match that waits for what shared tiers say."""

    source: str
    id: int
    keys: tuple[bytes, ...]
    tiers: list[int]
    num_jobs: int = 0
