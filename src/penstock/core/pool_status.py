"""What a pool's tiers hold, for people. Reads the pool, changes nothing."""

from __future__ import annotations

from penstock.core.kv_pool import KVPool
from penstock.core.tiering import HOST, PoolStatus, TierStatus


def pool_status(pool: KVPool) -> PoolStatus:
    """Per tier, nearest first."""
    largest = max(range(len(pool.host)), key=pool.record_bytes.__getitem__)
    host = pool.host[largest]
    found = [TierStatus(HOST, host.num_slots, len(host.entries), "on")]
    for tier in pool.lower:
        index = None if tier.indexes is None else tier.indexes[largest]
        capacity, used = (0, len(tier.known)) if index is None else (index.num_slots, len(index.entries))
        found.append(TierStatus(tier.name, capacity, used, tier.state, tier.rate.latency_s, tier.rate.byte_s))
    return PoolStatus(tuple(found))
