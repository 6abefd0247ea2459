"""What an engine tells routers of its cached blocks: numbered changes, a checksum over all it holds, snapshots.

The engine's side, `KVEventSource`, listens to its block pool. Knows hashes and tiers; no socket, format or router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from penstock.core.moves import DEVICE

TIERS = (DEVICE, "host", "disk", "remote")  # nearest first
BATCH_S = 0.010
MAX_BATCH = 4096  # blocks: a batch that is full does not wait
_MASK = 2**64 - 1
# Odd, so that each tier's fingerprints of a block differ and none is lost modulo 2^64.
_TIER_FACTORS = {tier: (2 * n + 1) * 0x9E3779B97F4A7C15 & _MASK | 1 for n, tier in enumerate(TIERS)}


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """What blocks hold, for routers that have their own hashes: the chain before them, token ids in order."""

    parent: bytes | None
    token_ids: tuple[int, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class KVChange:
    """Blocks that came to a tier or left it, in order. Hashes have 16 bytes; none at all: everything left it."""

    stored: bool
    tier: str
    hashes: tuple[bytes, ...]
    tokens: StoredTokens | None = None


@dataclass(frozen=True, slots=True)
class KVEvents:
    """Changes number `seq` of an engine's life. A later start of the engine has a larger `life` and counts from 0.

    `checksum`: of all blocks it holds after them (`fingerprint`), None where the engine gives none.
    """

    engine: str
    life: int
    seq: int
    changes: tuple[KVChange, ...]
    checksum: int | None = None


@dataclass(frozen=True, slots=True)
class KVSnapshot:
    """All that an engine holds, after the changes up to `seq` and perhaps a few more, which are told again."""

    engine: str
    life: int
    seq: int
    blocks: tuple[tuple[str, tuple[bytes, ...]], ...]  # (tier, hashes)
    checksum: int


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """A router's wish: it has missed something of this engine."""

    engine: str


def tier_factor(tier: str) -> int:
    """What a block's first 8 bytes are multiplied with in its fingerprint. Raises KeyError for an unknown tier."""
    return _TIER_FACTORS[tier]


def fingerprint(hash_: bytes, tier: str) -> int:
    """A block's share of a checksum: shares add up modulo 2^64, in any order."""
    return (int.from_bytes(hash_[:8], "little") or 1) * _TIER_FACTORS[tier] & _MASK


@dataclass(slots=True)
class _Run:
    """Changes of one kind, one tier after another; of blocks with tokens, one chain."""

    stored: bool
    tier: str
    hashes: list[bytes]
    parent: bytes | None = None
    token_ids: list[int] | None = None
    block_size: int = 0

    def follows(self, stored: bool, tier: str, parent: bytes | None, has_tokens: bool) -> bool:
        """Can a block be added?"""
        if not self.hashes or self.stored is not stored or self.tier != tier:
            return False
        return parent == self.hashes[-1] if has_tokens else self.token_ids is None

    def change(self) -> KVChange:
        tokens = None
        if self.token_ids is not None:
            tokens = StoredTokens(self.parent, tuple(self.token_ids), self.block_size)
        return KVChange(self.stored, self.tier, tuple(self.hashes), tokens)


class KVEventSource:
    """Collects changes and gives them out in batches, of which the first waits `batch_s` at most.

    `device`: the hashes in the device's cache now; other tiers are added with `add_tier`. `with_tokens`: whether
    changes carry token ids. One thread calls it: the engine's.
    """

    def __init__(
        self,
        engine: str,
        life: int,
        device: Callable[[], Iterable[bytes]],
        *,
        with_tokens: bool = False,
        batch_s: float = BATCH_S,
    ) -> None:
        self.engine = engine
        self.life = life
        self.with_tokens = with_tokens
        self.batch_s = batch_s
        self.checksum = 0
        self.seq = -1  # of the newest batch
        self._holdings: dict[str, Callable[[], Iterable[bytes]]] = {DEVICE: device}
        self._sums = {DEVICE: 0}
        self._runs: list[_Run] = []
        self._described: tuple[bytes, bytes | None, Sequence[int]] | None = None
        self._num_blocks = 0
        self._last_s = float("-inf")

    def add_tier(self, tier: str, holdings: Callable[[], Iterable[bytes]]) -> None:
        """`tier` will be told of with `stored` and `removed`, and is in snapshots."""
        self._holdings[tier] = holdings
        self._sums[tier] = 0

    # ---- what happens: called by the pool and the tiers ----

    def describe(self, hash_: bytes, parent: bytes | None, token_ids: Sequence[int]) -> None:
        """What the block holds that is stored next."""
        self._described = hash_, parent, token_ids

    def stored(self, hash_: bytes, tier: str = DEVICE) -> None:
        """A block can be hit in `tier` from now on."""
        self._sums[tier] += fingerprint(hash_, tier)
        described, self._described = self._described, None
        if described is None or described[0] != hash_:
            self._add(True, tier, hash_)
            return
        _, parent, token_ids = described
        self._num_blocks += 1
        if not self._runs or not self._runs[-1].follows(True, tier, parent, True):
            self._runs.append(_Run(True, tier, [], parent, [], len(token_ids)))
        run = self._runs[-1]
        run.hashes.append(hash_)
        assert run.token_ids is not None
        run.token_ids += token_ids

    def removed(self, hash_: bytes, tier: str = DEVICE) -> None:
        """It no longer can."""
        self._sums[tier] -= fingerprint(hash_, tier)
        self._add(False, tier, hash_)

    def cleared(self, tier: str = DEVICE) -> None:
        """Nothing can."""
        self._sums[tier] = 0
        self._runs.append(_Run(False, tier, []))
        self._num_blocks += 1

    def _add(self, stored: bool, tier: str, hash_: bytes) -> None:
        self._num_blocks += 1
        if self._runs and self._runs[-1].follows(stored, tier, None, False):
            self._runs[-1].hashes.append(hash_)
        else:
            self._runs.append(_Run(stored, tier, [hash_]))

    # ---- what is told ----

    @property
    def due_s(self) -> float | None:
        """When `take` has something; None while there is nothing to tell."""
        if not self._runs:
            return None
        return self._last_s if self._num_blocks >= MAX_BATCH else self._last_s + self.batch_s

    def take(self, now: float) -> KVEvents | None:
        """The next batch, if one is due."""
        due_s = self.due_s
        if due_s is None or now < due_s:
            return None
        self._last_s = now
        self.seq += 1
        changes = tuple(run.change() for run in self._runs)
        self._runs, self._num_blocks = [], 0
        return KVEvents(self.engine, self.life, self.seq, changes, self._checksum())

    def snapshot(self) -> KVSnapshot:
        """Everything held now. Changes not taken yet are in it; the next batch tells them again, which does no harm."""
        blocks = tuple((tier, tuple(holdings())) for tier, holdings in self._holdings.items())
        return KVSnapshot(self.engine, self.life, self.seq, blocks, self._checksum())

    def _checksum(self) -> int:
        return sum(self._sums.values()) & _MASK


def checksum_of(blocks: Sequence[tuple[str, Sequence[bytes]]]) -> int:
    """Of (tier, hashes) from scratch."""
    return sum(fingerprint(hash_, tier) for tier, hashes in blocks for hash_ in hashes) & _MASK
