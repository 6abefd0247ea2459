"""Tiers of the KV cache below the device: what engines and the pool of their machine say to each other, in plain data.

One *pool* per machine owns host memory (an arena of slots), local disk and a remote store; all engines of the machine
share it. Engines copy between device and slots themselves; the pool says only which slots. `kv_pool.py` is the pool's
side, `tier_client.py` an engine's, `tier_costs.py` what both predict with. Knows no byte, thread, clock or socket.

A *key* is a block's hash (`core/prefix.py`: model, KV format, adapter, salt and everything before the block are in it)
and one byte more, the index of its KV group. Slots count from 1 in each group; 0 is no slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.kv_events import KVEvents, KVSnapshot

HOST = "host"
NO_TIER = 0  # in Matched.tiers: the pool does not have it
IN_HOST = 1  # lower tiers follow: 2 is the first below host memory

WRITE_THROUGH = "write_through"  # when a block is there
WRITE_SELECTIVE = "write_through_selective"  # when a second request has asked for it
WRITE_BACK = "write_back"  # when it is about to be evicted above
WRITE_POLICIES = (WRITE_THROUGH, WRITE_SELECTIVE, WRITE_BACK)

BEST_EFFORT = "best_effort"  # what is there when the request could start
WAIT_COMPLETE = "wait_complete"  # all that was asked for, up to `max_wait_s`
TIMEOUT = "timeout"  # what is there after `wait_s + wait_token_s * tokens` from arrival
WAIT_POLICIES = (BEST_EFFORT, WAIT_COMPLETE, TIMEOUT)

BAD_BLOCK = "a block is not what its checksum says"  # beginning of MoveResult.error of a load that met one


def block_key(hash_: bytes, group: int) -> bytes:
    """Key of the block with this hash in KV group `group`."""
    return hash_ + bytes((group,))


def key_group(key: bytes) -> int:
    return key[-1]


# ---- engine to pool ----


@dataclass(frozen=True, slots=True)
class Match:
    """Which tiers hold these blocks? Answered by one Matched, late if a remote store has to be asked."""

    id: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring these blocks into host memory and keep them there until Release, or until the lease ends.

    In the order in which they are wanted: when host memory has no room the last ones are left out. `parents` (b"" for
    none) and `costs_s`, seconds to recompute a block, belong to the keys one by one. Answered by Fetched, several
    times while blocks come, the last one final.
    """

    id: int
    keys: tuple[bytes, ...]
    parents: tuple[bytes, ...]
    costs_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """The fetch or reservation `id` is over. `failed`: a fetched block was not what its checksum says: drop them."""

    id: int
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Reserve:
    """Slots for blocks that the engine wants to save. Fields as in Fetch. Answered by one Reserved."""

    id: int
    keys: tuple[bytes, ...]
    parents: tuple[bytes, ...]
    costs_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """The reservation's slots hold their blocks, where `filled` says so; the others are given back. Ends it."""

    id: int
    filled: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class WantContents:
    """A router has missed changes of the pool; answered by PoolHolds."""


# ---- pool to engine ----


@dataclass(frozen=True, slots=True)
class TierRate:
    """How fast a tier will read into host memory: `latency_s` per run, what waits there included; `byte_s` per byte."""

    name: str
    latency_s: float
    byte_s: float


@dataclass(frozen=True, slots=True)
class Matched:
    """Per key the fastest tier that holds it: NO_TIER, IN_HOST, or 2 + index into `rates`."""

    id: int
    tiers: tuple[int, ...]
    rates: tuple[TierRate, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Per key its slot, 0 where it is not there (yet). `final`: no more will come. Valid for `lease_s` from Fetch."""

    id: int
    slots: tuple[int, ...]
    final: bool
    lease_s: float


@dataclass(frozen=True, slots=True)
class Reserved:
    """Per key a slot to fill, or 0: it is there already, another engine fills it, or there is no room."""

    id: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expired:
    """The lease of fetch or reservation `id` has ended: its slots belong to others now."""

    id: int


@dataclass(frozen=True, slots=True)
class TierStatus:
    """A tier as its pool knows it, in blocks of the largest KV group. `capacity` 0: it has no bound of its own."""

    name: str
    capacity: int
    used: int
    state: str  # "on", or why it is off
    latency_s: float = 0.0  # of a read into host memory, as measured, and per byte; 0: it is host memory
    byte_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Said to every engine now and then."""

    tiers: tuple[TierStatus, ...]


@dataclass(frozen=True, slots=True)
class PoolChanged:
    """What came into the pool and what left it: for routers, every engine passes it on."""

    events: KVEvents


@dataclass(frozen=True, slots=True)
class PoolHolds:
    """All that the pool holds, for the router that asked."""

    snapshot: KVSnapshot


ToPool = Match | Fetch | Release | Reserve | Filled
ToEngine = Matched | Fetched | Reserved | Expired | PoolStatus
News = PoolChanged | PoolHolds  # for routers; engines pass it on unread


# ---- pool to its stores ----


@dataclass(frozen=True, slots=True)
class Job:
    """What a tier's store has to do. Jobs of one tier are done one after another, in order.

    kind "read": fill `slots`; "write": store `slots`, with `parents` and `costs_s` for whoever reads them after a
    restart; "delete"; "find": are `keys` there?
    """

    id: int
    tier: str
    kind: str
    keys: tuple[bytes, ...]
    slots: tuple[int, ...] = ()
    parents: tuple[bytes, ...] = ()
    costs_s: tuple[float, ...] = ()


# ---- settings and events ----


@dataclass(frozen=True, slots=True)
class TierSettings:
    """A tier below host memory.

    `num_blocks` per KV group is what the pool keeps there; None: other machines write there too and the store evicts by
    itself, so it is asked what it has. `write`: one of WRITE_POLICIES.
    """

    name: str
    num_blocks: tuple[int, ...] | None
    write: str = WRITE_SELECTIVE
    latency_s: float = 1e-4  # until reads were measured
    byte_s: float = 1e-9
    batch_bytes: int = 8 << 20  # of one job: so small that blocks come one after another
    max_jobs: int = 2  # in the store's hands; later ones wait here, where a cancelled read costs nothing
    retry_s: float = 10.0  # after an error, doubled each time, up to `max_retry_s`
    max_retry_s: float = 600.0

    def __post_init__(self) -> None:
        if self.write not in WRITE_POLICIES:
            raise ValueError(f"write policy of tier {self.name}: {self.write!r} is none of {', '.join(WRITE_POLICIES)}")


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How one engine uses its machine's pool. `write` is about host memory, one of WRITE_POLICIES."""

    write: str = WRITE_THROUGH
    wait: str = TIMEOUT
    wait_s: float = 0.02
    wait_token_s: float = 2e-5
    max_wait_s: float = 5.0
    min_tokens: int = 256  # shorter beginnings are not asked for
    latency_s: float = 1e-4  # from host memory, until loads were measured
    byte_s: float = 3e-10
    max_saves: int = 4  # reservations at a time
    save_bytes: int = 16 << 20  # of one reservation: so small that a load does not wait long behind its move
    max_queued: int = 4096  # blocks to be saved; beyond it new ones are given up: the oldest are their parents

    def __post_init__(self) -> None:
        if self.write not in WRITE_POLICIES:
            raise ValueError(f"write policy {self.write!r} is none of {', '.join(WRITE_POLICIES)}")
        if self.wait not in WAIT_POLICIES:
            raise ValueError(f"wait policy {self.wait!r} is none of {', '.join(WAIT_POLICIES)}")


@dataclass(frozen=True, slots=True)
class TierEvent:
    """Something an operator should read. kind "failed", "unprofitable", "on" or "policy"."""

    tier: str
    kind: str
    text: str
    at_s: float
