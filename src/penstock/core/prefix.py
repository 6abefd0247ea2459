"""The prefix cache: a salted 128-bit hash chain over full blocks, matched in every KV group at once.

Knows token ids and pools. Does not know requests' lives, budgets or tiers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.config.model import KVLayout
from penstock.core.blocks import BlockPool
from penstock.core.request import MediaItem


def chain_root(model_id: str, layout: KVLayout, adapter: str = "", salt: str = "") -> bytes:
    """The hash before the first block: nothing is shared across models, KV formats, adapters or salts."""
    return chain_start(model_id, layout.format, layout.block_size, adapter, salt)


def chain_start(model_id: str, format: str, block_size: int, adapter: str = "", salt: str = "") -> bytes:
    """`chain_root` for those who know a layout by the name of its format."""
    parts = (model_id, format, str(block_size), adapter, salt)
    key = "".join(f"{len(part)}:{part}" for part in parts)  # lengths, so that no two tuples give one string
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def extend_chain(
    hashes: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, media: Sequence[MediaItem] = ()
) -> None:
    """Append the hashes of blocks that `token_ids` fills and `hashes` lacks. Mutates `hashes`.

    blake2b-128 of (previous hash, 32-bit token ids, media that overlap the block with their offset in it).
    """
    previous = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        end = start + block_size
        digest = hashlib.blake2b(previous, digest_size=16)
        digest.update(array("I", token_ids[start:end]).tobytes())
        for item in media:
            if item.start < end and start < item.start + item.num_tokens:
                digest.update(f"{item.content_hash}:{item.start - start}".encode())
        previous = digest.digest()
        hashes.append(previous)


@dataclass(frozen=True, slots=True)
class Hit:
    """`num_blocks` blocks from the start are in place. `block_ids` per group, 0 where the group needs none."""

    num_blocks: int
    block_ids: tuple[list[int], ...]


class PrefixCache:
    """Longest usable prefix over all groups of `layout`; one pool per group, in group order."""

    def __init__(self, layout: KVLayout, pools: Sequence[BlockPool]) -> None:
        self.layout = layout
        self.pools = pools
        self.block_size = layout.block_size

    def match(self, hashes: Sequence[bytes], limit: int) -> Hit:
        """The longest prefix of at most `limit` blocks for which every group has what it needs. Takes no reference.

        A full group needs all its blocks, a window group those that the next token can still see.
        """
        num = min(limit, len(hashes))
        while True:
            before = num
            for group, pool in zip(self.layout.groups, self.pools, strict=True):
                if group.window is None:
                    num = self._run(pool, hashes, num)
                else:
                    num = self._run_ending(pool, hashes, num, group.window)
            if num == before:
                break
        ids = []
        for group, pool in zip(self.layout.groups, self.pools, strict=True):
            first = 0 if group.window is None else self.first_visible(group.window, num * self.block_size)
            ids.append([0] * first + [pool.index[h].id for h in hashes[first:num]])
        return Hit(num, tuple(ids))

    def first_visible(self, window: int, position: int) -> int:
        """Index of the first block that a token at `position` or later can see through a window."""
        return max(0, position - window + 1) // self.block_size

    @staticmethod
    def _run(pool: BlockPool, hashes: Sequence[bytes], limit: int) -> int:
        index = pool.index
        for n in range(limit):
            if hashes[n] not in index:
                return n
        return limit

    def _run_ending(self, pool: BlockPool, hashes: Sequence[bytes], limit: int, window: int) -> int:
        """Largest n <= limit such that blocks [first_visible(n), n) are all there."""
        index, num = pool.index, limit
        for n in range(limit - 1, -1, -1):
            if n < self.first_visible(window, num * self.block_size):
                break
            if hashes[n] not in index:
                num = n
        return num
