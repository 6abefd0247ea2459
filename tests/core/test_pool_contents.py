"""What a pool tells routers: after any history an index that heard all of it knows what host memory and disk hold."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.kv_index import KVIndex, keys_of
from penstock.core.kv_pool import KVPool
from penstock.core.pool_contents import POOL, PoolContents
from penstock.core.tiering import WRITE_THROUGH, Filled, Release, Reserve, Reserved, TierSettings, block_key


def pool_of(host=4, disk=8):
    return KVPool((100,), (host,), [TierSettings("disk", (disk,), WRITE_THROUGH)], "lru")


def held(pool):
    """Hashes that any tier has."""
    return {key[:-1] for key in [*pool.host[0].entries, *pool.lower[0].indexes[0].entries]}


def save(pool, id_, keys, now):
    """An engine saves blocks, and the store of the disk does what it is asked."""
    answers = pool.handle("e", Reserve(id_, keys, (b"",) * len(keys), (0.01,) * len(keys)), now)
    (reserved,) = [answer for _, answer in answers if isinstance(answer, Reserved)]
    pool.handle("e", Filled(id_, tuple(slot > 0 for slot in reserved.slots)), now)
    while jobs := pool.jobs():
        for job in jobs:
            pool.job_done(job.id, [True] * len(job.keys), 0.001, now)
    pool.handle("e", Release(id_), now)


@given(st.integers(0, 2**32), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_an_index_that_hears_all_knows_what_the_pool_holds(seed, begin):
    """Whatever was there before; checksums agree, and a router that comes late has the same from a snapshot."""
    draw, pool, index = random.Random(seed), pool_of(), KVIndex(64)
    keys = [block_key(bytes([n] * 16), 0) for n in range(1, 20)]
    for n in range(begin):
        save(pool, n, tuple(draw.sample(keys, 2)), float(n))
    contents = PoolContents(pool, life=7)
    index.add(POOL, shared=True)
    for n in range(begin, begin + 30):
        save(pool, n, tuple(draw.sample(keys, draw.randint(1, 3))), float(n))
        events = contents.take(float(n))
        if events is not None:
            assert index.apply(events, float(n)) is None
        assert {h.key for h in index.holdings(POOL)} == set(keys_of(list(held(pool))).tolist())
    late = KVIndex(64)
    late.add(POOL, shared=True)
    assert late.restore(contents.snapshot(), 100.0) is None
    assert {h.key for h in late.holdings(POOL)} == {h.key for h in index.holdings(POOL)} and late.num_refused == 0


def test_a_block_in_two_tiers_is_told_of_once_and_gone_when_the_last_has_dropped_it():
    pool = pool_of(host=1, disk=1)
    contents = PoolContents(pool, life=1)
    first, second = (block_key(bytes([n] * 16), 0) for n in (1, 2))
    save(pool, 0, (first,), 0.0)
    assert first in pool.host[0] and first in pool.lower[0].indexes[0]
    told = contents.take(0.0)
    assert [(change.stored, change.hashes) for change in told.changes] == [(True, (first[:-1],))]
    pool.host[0].remove(first)
    assert contents.take(1.0) is None
    pool.lower[0].indexes[0].remove(first)
    told = contents.take(2.0)
    assert [(change.stored, change.hashes) for change in told.changes] == [(False, (first[:-1],))]
    assert told.seq == 1 and told.checksum == 0 and second not in pool.host[0]
