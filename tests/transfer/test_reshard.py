"""Resharding, proved on bytes: what the plan moves is what the destination would have been given directly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.config.model import KVGroup
from penstock.transfer.reshard import heads_of, page_ranges, reshard, shard

LAYERS = (1, 4, 5)
SHAPES = st.sampled_from(
    [
        KVGroup(0, "full", LAYERS, None, 16, 4, 6, "bfloat16"),
        KVGroup(0, "full", LAYERS, None, 16, 8, 4, "float32"),
        KVGroup(0, "window", LAYERS, 64, 32, 4, 16, "int8"),  # scales follow each head's elements
        KVGroup(0, "full", LAYERS, None, 32, 2, 16, "bfloat16", "paired"),  # fewer heads than ranks
        KVGroup(0, "full", LAYERS, None, 64, 1, 576, "bfloat16", parts=("k",)),  # latent
    ]
)
PAIRS = st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (4, 1), (1, 4), (2, 2), (8, 2)])


def sharded(group: KVGroup, block: np.ndarray, tp: int, rank: int) -> np.ndarray:
    """A page-first block of all heads, as that rank holds it: head by head, straight from the definition."""
    local = shard(group, tp, rank)
    out = np.empty(local.block_bytes, np.uint8)
    for layer in group.layers:
        for part in group.parts:
            for n, head in enumerate(heads_of(group.num_kv_heads, tp, rank)):
                src, length = group.extent(layer, part, head, head + 1)
                dst, _ = local.extent(layer, part, n, n + 1)
                out[dst : dst + length] = block[src : src + length]
    return out


@given(group=SHAPES, tps=PAIRS, seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_moved_by_the_plan_equals_sharded_directly(group: KVGroup, tps: tuple[int, int], seed: int) -> None:
    """Every byte of every destination is written exactly once, with the right content, page-first and layer-first."""
    tp_src, tp_dst = tps
    block = np.random.default_rng(seed).integers(0, 256, group.block_bytes, np.uint8)
    sources = [sharded(group, block, tp_src, rank) for rank in range(tp_src)]
    plan = reshard(group, tp_src, tp_dst)
    for dst_rank in range(tp_dst):
        wanted = sharded(group, block, tp_dst, dst_rank)
        page, by_layer = np.zeros_like(wanted), np.zeros_like(wanted).reshape(len(LAYERS), -1)
        written = np.zeros(len(wanted), int)
        for (src_rank, to), ranges in plan.items():
            if to != dst_rank:
                continue
            src_bytes = shard(group, tp_src, src_rank).layer_bytes
            dst_bytes = shard(group, tp_dst, dst_rank).layer_bytes
            for each in page_ranges(ranges, len(LAYERS), src_bytes, dst_bytes):
                page[each.dst : each.dst + each.length] = sources[src_rank][each.src : each.src + each.length]
                written[each.dst : each.dst + each.length] += 1
            for n in range(len(LAYERS)):
                layer = sources[src_rank].reshape(len(LAYERS), -1)[n]
                for each in ranges:
                    by_layer[n, each.dst : each.dst + each.length] = layer[each.src : each.src + each.length]
        assert (written == 1).all()
        np.testing.assert_array_equal(page, wanted)
        np.testing.assert_array_equal(by_layer.reshape(-1), wanted)


def test_ranges_are_merged() -> None:
    """Equal splits are one range of the whole block; halves are one range per layer and part."""
    group = KVGroup(0, "full", LAYERS, None, 16, 4, 8, "bfloat16")
    (same,) = reshard(group, 1, 1).values()
    assert len(page_ranges(same, 3, group.layer_bytes, group.layer_bytes)) == 1
    assert [len(ranges) for ranges in reshard(group, 2, 1).values()] == [2, 2]
    assert set(reshard(group, 2, 1)) == {(0, 0), (1, 0)}


def test_copies_of_a_head_take_turns() -> None:
    """One head on four source ranks, two destinations: two different ranks send, and only they."""
    latent = KVGroup(0, "full", LAYERS, None, 64, 1, 576, "bfloat16", parts=("k",))
    assert set(reshard(latent, 4, 2)) == {(0, 0), (1, 1)}


def test_splits_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        reshard(KVGroup(0, "full", LAYERS, None, 16, 4, 8, "bfloat16"), 3, 1)
