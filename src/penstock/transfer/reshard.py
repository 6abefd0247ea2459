"""Which bytes of a block go from which rank to which when the two ends split heads over unequal numbers of ranks.

Pure arithmetic on `KVGroup.extent`. Elements and their scales travel as they are; nothing is re-encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from penstock.config.model import KVGroup


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes from `src` of a block at the source rank to `dst` of the same block at the destination rank."""

    src: int
    dst: int
    length: int


def heads_of(num_kv_heads: int, tp: int, rank: int) -> range:
    """The global KV heads of one of `tp` ranks: equal shares, or one head each, repeated, where ranks outnumber heads.

    Raises ValueError where neither divides the other.
    """
    if num_kv_heads % tp == 0:
        share = num_kv_heads // tp
        return range(rank * share, (rank + 1) * share)
    if tp % num_kv_heads == 0:
        head = rank // (tp // num_kv_heads)
        return range(head, head + 1)
    raise ValueError(f"{num_kv_heads} KV heads cannot be split over {tp} ranks")


def shard(group: KVGroup, tp: int, rank: int) -> KVGroup:
    """The group as that rank's pools hold it; `group` has all heads."""
    return replace(group, num_kv_heads=len(heads_of(group.num_kv_heads, tp, rank)))


def reshard(group: KVGroup, tp_src: int, tp_dst: int) -> dict[tuple[int, int], tuple[ByteRange, ...]]:
    """(source rank, destination rank) -> byte ranges inside a block in *one layer*, adjacent ones merged.

    All layers of a group are alike: `page_ranges` makes ranges of whole page-first blocks of them, and a layer-first
    pool uses them as they are. Each byte of each destination rank comes from exactly one source; of ranks that hold the
    same head, destinations take turns, so that none has to send all copies.
    """
    layer = group.layers[0]
    plan: dict[tuple[int, int], list[ByteRange]] = {}
    for dst_rank in range(tp_dst):
        dst_heads = heads_of(group.num_kv_heads, tp_dst, dst_rank)
        dst_group = shard(group, tp_dst, dst_rank)
        for part in group.parts:
            for head in dst_heads:
                holders = [r for r in range(tp_src) if head in heads_of(group.num_kv_heads, tp_src, r)]
                src_rank = holders[dst_rank % len(holders)]
                src_first = heads_of(group.num_kv_heads, tp_src, src_rank).start
                at, dst_at = head - src_first, head - dst_heads.start
                src, length = shard(group, tp_src, src_rank).extent(layer, part, at, at + 1)
                dst, _ = dst_group.extent(layer, part, dst_at, dst_at + 1)
                plan.setdefault((src_rank, dst_rank), []).append(ByteRange(src, dst, length))
    return {ranks: merge(ranges) for ranks, ranges in plan.items()}


def page_ranges(
    ranges: Iterable[ByteRange], num_layers: int, src_layer_bytes: int, dst_layer_bytes: int
) -> tuple[ByteRange, ...]:
    """Ranges of one layer, for all layers of page-first blocks, merged again."""
    ranges = tuple(ranges)
    return merge(
        ByteRange(layer * src_layer_bytes + each.src, layer * dst_layer_bytes + each.dst, each.length)
        for layer in range(num_layers)
        for each in ranges
    )


def merge(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Sorted by destination; neighbours at both ends become one."""
    merged: list[ByteRange] = []
    for each in sorted(ranges, key=lambda r: r.dst):
        last = merged[-1] if merged else None
        if last and last.src + last.length == each.src and last.dst + last.length == each.dst:
            merged[-1] = ByteRange(last.src, last.dst, last.length + each.length)
        else:
            merged.append(each)
    return tuple(merged)
