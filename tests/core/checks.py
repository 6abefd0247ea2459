"""What must hold of a scheduler between any two calls, recomputed from scratch. Reads its private state on purpose."""

from __future__ import annotations

from collections import Counter

from penstock.core.blocks import BlockPool
from penstock.core.moves import DEVICE
from penstock.core.scheduler import Scheduler


def check_pool(
    pool: BlockPool, refs: dict[int, int], newest_in_flight: int | None = None, pins: dict[int, int] | None = None
) -> None:
    """Each block is in exactly one state, and every count says so. `refs`, `pins`: those that holders know of."""
    null = pool.blocks[0]
    assert null.num_refs == 0
    assert null.hash is None
    assert 0 not in refs
    free = set(pool._free)
    assert len(free) == len(pool._free), "a block is free twice"
    cached, num_limbo, num_shared, num_held = [], 0, 0, 0
    published: dict[bytes, object] = {}
    children: dict[bytes, int] = {}
    for block in pool.blocks[1:]:
        id_, num_refs, hash_ = block.id, block.num_refs, block.hash
        assert num_refs == refs.get(id_, 0), f"block {id_}"
        assert block.num_pins == (pins or {}).get(id_, 0), f"block {id_}"
        if hash_ is not None:
            assert hash_ not in published, "two blocks with one hash"
            published[hash_] = block
            if pool.leaf_first and block.parent_hash is not None:
                children[block.parent_hash] = children.get(block.parent_hash, 0) + 1
        if num_refs:
            num_held += 1
            num_shared += num_refs > 1
            assert block.fence < 0
        elif block.fence >= 0 or block.num_pins:
            num_limbo += 1
            assert newest_in_flight is None or block.fence <= newest_in_flight
        elif hash_ is not None:
            cached.append(block)
        else:
            free.remove(id_)  # fails when the block is lost
    assert not free, "a block that is free is something else too"
    assert pool.num_cached == len(cached)
    assert pool.num_limbo == num_limbo
    assert pool.num_shared == num_shared
    assert pool.num_held == num_held
    assert pool.num_available == len(cached) + pool.num_free
    assert num_held + num_limbo + len(cached) + pool.num_free == pool.num_blocks - 1
    assert pool.index == published
    assert pool._num_children == children
    assert len(pool.ghosts) <= pool.num_blocks
    assert pool.ghosts.keys().isdisjoint(pool.index)
    in_heap = set(pool._heap)
    for block in cached:
        assert block.hash in children or (block.last_use, block.id) in in_heap, "a cached leaf eviction would not find"


def check_scheduler(scheduler: Scheduler) -> None:
    """Blocks add up over all requests; counts of work in flight equal what was submitted."""
    running, waiting, size = scheduler.running, scheduler.waiting, scheduler.block_size
    assert len(running) <= scheduler.limits.max_num_seqs
    assert len({r.id for r in running} | {r.id for r in waiting}) == len(running) + len(waiting)
    assert {r.id for r in running} | {r.id for r in waiting} == scheduler.requests.keys()
    newest = scheduler._submitted[-1].plan.step if scheduler._submitted else -1

    for g, pool in enumerate(scheduler.pools):
        refs: dict[int, int] = {}
        for request in running:
            ids = [id_ for id_ in request.block_tables[g] if id_]
            assert len(set(ids)) == len(ids)
            for id_ in ids:
                refs[id_] = refs.get(id_, 0) + 1
        pins: Counter[int] = Counter()
        for flight in scheduler.traffic.flights.values():
            place = flight.move.src if flight.move.src.where == DEVICE else flight.move.dst
            pins.update(id_ for id_ in place.block_ids[g] if id_)
        check_pool(pool, refs, newest, pins)

    planned: Counter[str] = Counter()
    unsampled: Counter[str] = Counter()
    in_flight: Counter[str] = Counter()
    computing: Counter[bytes] = Counter()
    for submitted in scheduler._submitted:
        computing.update(submitted.filling)
        for row, (request, epoch) in zip(submitted.plan.rows, submitted.rows, strict=True):
            assert row.request_id == request.id
            if scheduler.requests.get(request.id) is not request:
                continue
            in_flight[request.id] += 1
            if row.samples:
                unsampled[request.id] += 1 + row.num_draft
            if epoch == request.epoch:
                planned[request.id] += row.num_tokens
    for id_, flight in scheduler.traffic.flights.items():
        computing.update(flight.filling)
        waits = flight.request is not None and flight.request.arriving == id_
        assert waits or not flight.filling, "others wait for what nobody waits for"
    assert scheduler.kv._computing == dict(computing)
    for request in scheduler.requests.values():
        assert request.finish_reason is None
        assert request.num_in_flight == in_flight[request.id]
        assert request.num_planned == planned[request.id]
        assert request.num_unsampled == unsampled[request.id]
        assert request.num_pending >= 0
        assert request.num_known <= request.max_total
        assert len(request.block_hashes) <= len(request.token_ids) // size
    for request in waiting:
        assert not request.is_running
        assert not any(request.block_tables)
        assert request.num_computed == request.num_planned == 0
    for request in running:
        assert request.is_running
        assert request.num_computed <= len(request.token_ids)
        num_blocks = {len(table) for table in request.block_tables}
        assert len(num_blocks) == 1
        assert num_blocks.pop() >= -(-(request.num_computed + request.num_planned) // size)
        assert all(n <= request.num_computed // size for n in request.num_published)
        flight = scheduler.traffic.flights.get(request.arriving)
        end = request.num_computed if flight is None else max(flight.end, request.num_computed)
        for group, table in zip(scheduler.layout.groups, request.block_tables, strict=True):
            first = 0
            if group.window is not None:
                first = max(0, end - group.window + 1) // size
                assert flight is not None or not any(table[:first]), "a block behind the window is still held"
            assert all(table[first:])
            blocks = scheduler.pools[group.index].blocks
            for id_ in filter(None, table[request.num_computed // size :]):
                assert blocks[id_].num_refs == 1, "a block still to be written is shared"
                assert blocks[id_].hash is None, "a block is published before it is committed"


def check_idle(scheduler: Scheduler) -> None:
    """Nothing is left over when no request is."""
    check_scheduler(scheduler)
    assert not scheduler.requests
    assert not scheduler._submitted
    assert not scheduler.kv._computing
    for pool in scheduler.pools:
        assert pool.num_held == pool.num_limbo == pool.num_shared == 0
        assert pool.num_free + pool.num_cached == pool.num_blocks - 1
