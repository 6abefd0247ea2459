"""The KV pools of one rank as bytes: where units lie, and a sum that tells whether they arrived.

A unit is one block in one layer. Knows layouts and memory; does not know where units come from or go to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.config.model import KVLayout

Bytes = NDArray[np.uint8]
Ids = NDArray[np.int64]

MASK = (1 << 64) - 1
LAYER_SHIFT = 40  # unit number = layer << 40 | block id
SUM_BYTES = 4 << 20  # units that do not lie together are gathered for their sum in copies of about this size


class KVMemory:
    """The pools of one rank: `pools[layer]` is uint8 [num_blocks, layer_bytes], C-contiguous and writable.

    `num_blocks` is that of the layer's KV group. Copies nothing and owns nothing: the pools must outlive it.
    """

    def __init__(self, layout: KVLayout, pools: Sequence[Bytes]) -> None:
        self.layout = layout
        self.pools = tuple(pools)
        groups = {layer: group for group in layout.groups for layer in group.layers}
        if sorted(groups) != list(range(len(pools))):
            raise ValueError(f"{len(pools)} pools for a layout of {len(groups)} layers")
        self.group_of = tuple(groups[layer].index for layer in range(len(pools)))
        self.layer_bytes = tuple(groups[layer].layer_bytes for layer in range(len(pools)))
        for layer, pool in enumerate(self.pools):
            if pool.dtype != np.uint8 or pool.ndim != 2 or pool.shape[1] != self.layer_bytes[layer]:
                raise ValueError(
                    f"pool of layer {layer}: {pool.dtype} {list(pool.shape)}, not uint8 [*, {self.layer_bytes[layer]}]"
                )
            if not (pool.flags.c_contiguous and pool.flags.writeable):
                raise ValueError(f"pool of layer {layer} must be contiguous and writable")
        self._flat = tuple(pool.reshape(-1).data for pool in self.pools)

    @property
    def num_layers(self) -> int:
        return len(self.pools)

    def num_blocks(self, layer: int) -> int:
        """Of the pool that holds `layer`."""
        return int(self.pools[layer].shape[0])

    def scatter(self, layer: int, block_ids: Sequence[int] | Ids) -> list[memoryview]:
        """The bytes of these blocks in one layer, in their order: one view per run of consecutive ids.

        The layer says the KV group. Raises IndexError for an id outside the pool.
        """
        return self.scatter_runs(layer, runs_of(np.asarray(block_ids, np.int64)))

    def scatter_runs(self, layer: int, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        """`scatter` of runs (first block id, number of blocks)."""
        size, flat, limit = self.layer_bytes[layer], self._flat[layer], self.num_blocks(layer)
        for first, count in runs:
            if first < 0 or count < 1 or first + count > limit:
                raise IndexError(f"blocks [{first}, {first + count}) of layer {layer}: the pool has {limit}")
        return [flat[first * size : (first + count) * size] for first, count in runs]

    def fill(self, layer: int, block_id: int, content: Bytes) -> None:
        """Copy one unit in: uint8 [layer_bytes]."""
        self.pools[layer][block_id] = content

    def checksum(self, layer: int, block_ids: Sequence[int] | Ids, units: Sequence[int] | Ids | None = None) -> int:
        """`checksum` of these blocks in one layer, as units (layer, units[i]); `units`: None means `block_ids`.

        A sender gives the receiver's block ids, so that both ends number alike.
        """
        ids = np.asarray(block_ids, np.int64)
        numbers = unit_numbers(layer, ids if units is None else np.asarray(units, np.int64))
        pool, size = self.pools[layer], self.layer_bytes[layer]
        together = len(ids) > 0 and int(ids[-1]) - int(ids[0]) == len(ids) - 1 and bool((np.diff(ids) == 1).all())
        if together:
            return checksum(pool[int(ids[0]) : int(ids[0]) + len(ids)], numbers)
        total, stride = 0, max(1, SUM_BYTES // size)
        for start in range(0, len(ids), stride):
            total += checksum(pool[ids[start : start + stride]], numbers[start : start + stride])
        return total & MASK


def runs_of(block_ids: Ids) -> list[tuple[int, int]]:
    """Consecutive ids as (first, count), in the order given."""
    if not len(block_ids):
        return []
    starts = np.flatnonzero(np.diff(block_ids, prepend=block_ids[0] - 2) != 1)
    counts = np.diff(starts, append=len(block_ids))
    return list(zip(block_ids[starts].tolist(), counts.tolist()))


def unit_numbers(layer: int, block_ids: Ids) -> NDArray[np.uint64]:
    """What `checksum` calls the units (layer, block id): distinct numbers."""
    return block_ids.astype(np.uint64) | np.uint64(layer << LAYER_SHIFT)


def checksum(content: Bytes, units: NDArray[np.uint64]) -> int:
    """Sum over units, modulo 2^64, of what depends on each one's bytes and number; [N, unit bytes] and [N] -> int.

    Sums of parts add up to the sum of the whole, in any order. Inside a unit it is the dot product of its 64-bit words
    (the last one filled up with zeros) with fixed odd numbers; that, plus one hash of the unit's number, times another
    odd one. So a change within one word is always noticed; a unit that is lost, doubled, swapped with another or in
    another's place, words that are swapped, and changes in many places go unnoticed with a chance of about 2^-63 where
    they do not depend on this function. It is no defence against somebody who wants a certain sum.
    """
    num_units, num_bytes = content.shape
    if num_units == 0:
        return 0
    if num_bytes % 8:
        whole = np.zeros((num_units, -(-num_bytes // 8) * 8), np.uint8)
        whole[:, :num_bytes] = content
        content = whole
    words = content.view(np.uint64)
    # einsum: a dot product of integers at the speed of memory; other threads run meanwhile. `@` takes twice as long.
    sums = np.einsum("ij,j->i", words, _weights(words.shape[1]))
    terms = (sums + _hash(units)) * (_hash(~units) | np.uint64(1))
    return int(np.add.reduce(terms))


@functools.lru_cache(maxsize=16)
def _weights(count: int) -> NDArray[np.uint64]:
    """The first `count` of a fixed sequence of odd numbers."""
    return _hash(np.arange(count, dtype=np.uint64)) | np.uint64(1)


def _hash(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit numbers that looks random."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
