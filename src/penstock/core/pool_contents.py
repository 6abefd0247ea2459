"""What a machine's pool holds, told to routers like an engine's cache: numbered changes, a checksum, snapshots.

Of host memory and the disk; what a remote store has is known only when it is asked. Reads the pool, changes nothing.
"""

from __future__ import annotations

from penstock.core.kv_events import KVEvents, KVEventSource, KVSnapshot
from penstock.core.kv_pool import KVPool
from penstock.core.tiering import key_group

POOL = "pool"  # its name among engines
TIER = "remote"  # of all that it holds: every engine of the machine reads it, none has it at home


class PoolContents:
    """Listens to a pool. A block is told of when the first of its tiers has it, and again when the last has not.

    Of the largest KV group: the others' blocks come and go with it. `life`: larger than that of any pool before.
    """

    def __init__(self, pool: KVPool, life: int) -> None:
        self._events = KVEventSource(POOL, life, tuple)
        self._events.add_tier(TIER, lambda: self._num_tiers)
        self._num_tiers: dict[bytes, int] = {}
        self._group = max(range(len(pool.host)), key=pool.record_bytes.__getitem__)
        lower = [tier.indexes[self._group] for tier in pool.lower if tier.indexes is not None]
        for index in [pool.host[self._group], *lower]:
            for key in index.entries:
                self._changed(key, True)
            index.listener = self._changed

    def take(self, now: float) -> KVEvents | None:
        """The next batch, if one is due."""
        return self._events.take(now)

    def snapshot(self) -> KVSnapshot:
        """Everything held now."""
        return self._events.snapshot()

    def _changed(self, key: bytes, is_there: bool) -> None:
        assert key_group(key) == self._group
        hash_ = key[:-1]
        num_tiers = self._num_tiers.get(hash_, 0) + (1 if is_there else -1)
        if num_tiers:
            self._num_tiers[hash_] = num_tiers
            if is_there and num_tiers == 1:
                self._events.stored(hash_, TIER)
        else:
            del self._num_tiers[hash_]
            self._events.removed(hash_, TIER)
