"""KV blocks of one group: who holds them, which are cached, which may be given away. Knows ids, never bytes.

A block is in exactly one state: null (id 0, never given out), free (no reference, no hash), cached (no reference, has a
hash: a hit if asked for, given away if needed), held (referenced), or in limbo (no reference, but steps in flight or
moves may touch it; reusable when they have ended, but a block with a hash can still be hit there).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, eq=False)
class Block:
    """One block. Written by its pool alone."""

    id: int
    num_refs: int = 0
    hash: bytes | None = None
    parent_hash: bytes | None = None
    last_use: int = 0  # of the pool's counter, set when the last reference goes
    heat: int = 0  # hits so far
    fence: int = -1  # step that must end before reuse; -1: none
    num_pins: int = 0  # moves that read or write it: they must end before reuse


class BlockListener(Protocol):
    """Is told which blocks can be hit."""

    def stored(self, hash_: bytes) -> None: ...

    def removed(self, hash_: bytes) -> None: ...

    def cleared(self) -> None: ...


class BlockPool:
    """Blocks 1 .. num_blocks - 1 of one KV group. Eviction is least recently used, leaves of the prefix tree first.

    `leaf_first`: off for window groups, whose early blocks may go before the late ones.
    """

    def __init__(self, num_blocks: int, leaf_first: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"a block pool needs at least 2 blocks (one is the null block), got {num_blocks}")
        self.num_blocks = num_blocks
        self.leaf_first = leaf_first
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.index: dict[bytes, Block] = {}
        self.num_cached = 0  # no reference, a hash, not in limbo
        self.num_limbo = 0
        self.num_shared = 0  # two references or more
        self.ghosts: OrderedDict[bytes, float] = OrderedDict()  # evicted hash -> when
        self.listener: BlockListener | None = None
        self._free = list(range(num_blocks - 1, 0, -1))
        self._heap: list[tuple[int, int]] = []  # (last_use, id) of cached blocks; checked when popped
        self._num_children: dict[bytes, int] = {}  # resident published blocks by the hash of their parent
        self._limbo: deque[tuple[int, Block]] = deque()
        self._uses = 0

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give now."""
        return len(self._free) + self.num_cached

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks with a reference."""
        return self.num_blocks - 1 - len(self._free) - self.num_cached - self.num_limbo

    def allocate(self, now: float) -> int:
        """A block with one reference and no hash. The caller has checked `num_available`."""
        block = self.blocks[self._free.pop()] if self._free else self._evict(now)
        block.num_refs = 1
        return block.id

    def hit(self, hash_: bytes) -> Block | None:
        """The published block with this content, or None. Takes no reference."""
        return self.index.get(hash_)

    def hold(self, block: Block) -> None:
        """One more reference to a published block."""
        if block.num_refs == 0:
            if block.fence >= 0 or block.num_pins:
                block.fence = -1  # leaves limbo: its entry there no longer counts
                self.num_limbo -= 1
            else:
                self.num_cached -= 1
        elif block.num_refs == 1:
            self.num_shared += 1
        block.num_refs += 1
        block.heat += 1

    def count_cached(self, block_ids: Iterable[int]) -> int:
        """How many of these could be given away now: holding them takes them from `num_available`."""
        blocks = self.blocks
        return sum(1 for id_ in block_ids if id_ and self._idle(blocks[id_]))

    def publish(self, block_id: int, hash_: bytes, parent_hash: bytes | None) -> None:
        """Make a held, computed block findable. A second block with the same content stays private."""
        if hash_ in self.index:
            return
        block = self.blocks[block_id]
        assert block.num_refs > 0 and block.hash is None
        block.hash, block.parent_hash = hash_, parent_hash
        self.index[hash_] = block
        self.ghosts.pop(hash_, None)
        if self.leaf_first and parent_hash is not None:
            self._num_children[parent_hash] = self._num_children.get(parent_hash, 0) + 1
        if self.listener is not None:
            self.listener.stored(hash_)

    def release(self, block_id: int, fence: int) -> None:
        """Give one reference back. `fence`: last step in flight that may touch the block, -1 when none is.

        Callers release a request's blocks last to first, so that of equally old blocks leaves go before their parents.
        """
        block = self.blocks[block_id]
        assert block.num_refs > 0
        block.num_refs -= 1
        if block.num_refs == 1:
            self.num_shared -= 1
        elif block.num_refs == 0:
            if fence < 0 and not block.num_pins:
                self._retire(block)
                return
            self.num_limbo += 1
            if fence >= 0:
                block.fence = fence
                self._limbo.append((fence, block))

    def settle(self, step: int) -> None:
        """Step `step` and all before it have ended: what only they could touch is reusable."""
        while self._limbo and self._limbo[0][0] <= step:
            fence, block = self._limbo.popleft()
            if block.num_refs == 0 and block.fence == fence:
                block.fence = -1
                if not block.num_pins:
                    self.num_limbo -= 1
                    self._retire(block)

    def pin(self, block_id: int) -> None:
        """A move begins to read or write the block: held, or with a hash."""
        block = self.blocks[block_id]
        assert block_id and (block.num_refs or block.hash is not None)
        if self._cached(block):
            self.num_cached -= 1
            self.num_limbo += 1
        block.num_pins += 1

    def unpin(self, block_id: int) -> None:
        """The move has ended."""
        block = self.blocks[block_id]
        assert block.num_pins > 0
        block.num_pins -= 1
        if self._idle(block):
            self.num_limbo -= 1
            self._retire(block)

    def coldest(self, num: int) -> list[bytes]:
        """Hashes of cached blocks that are given away next, as far as the newest look at them tells."""
        blocks = (self.blocks[id_] for _, id_ in heapq.nsmallest(num, self._heap))
        return [block.hash for block in blocks if block.hash is not None and self._idle(block)]

    def forget(self) -> None:
        """Unpublish everything: cached blocks become free, held and limbo ones lose their hash."""
        if self.listener is not None:
            self.listener.cleared()
        self.index.clear()
        self._num_children.clear()
        self._heap.clear()
        for block in self.blocks[1:]:
            if block.hash is not None:
                block.hash = block.parent_hash = None
                if self._idle(block):
                    self.num_cached -= 1
                    self._free.append(block.id)

    def _retire(self, block: Block) -> None:
        if block.hash is None:
            self._free.append(block.id)
            return
        self._uses += 1
        block.last_use = self._uses
        self.num_cached += 1
        if block.hash not in self._num_children:
            heapq.heappush(self._heap, (block.last_use, block.id))
            if len(self._heap) > 4 * self.num_blocks:  # mostly blocks that were hit again since
                self._heap = [(b.last_use, b.id) for b in self.blocks if self._cached(b)]
                heapq.heapify(self._heap)

    def _evict(self, now: float) -> Block:
        while self._heap:
            last_use, block_id = heapq.heappop(self._heap)
            block = self.blocks[block_id]
            if self._cached(block) and block.last_use == last_use and block.hash not in self._num_children:
                return self._unpublish(block, now)
        # Every cached block has a resident child that somebody holds: the oldest goes, its children become roots.
        return self._unpublish(min(filter(self._cached, self.blocks), key=lambda block: block.last_use), now)

    @staticmethod
    def _idle(block: Block) -> bool:
        """Nobody holds it, and nothing in flight may touch it."""
        return block.num_refs == 0 and block.fence < 0 and not block.num_pins

    def _cached(self, block: Block) -> bool:
        return block.hash is not None and self._idle(block)

    def _unpublish(self, block: Block, now: float) -> Block:
        assert block.hash is not None
        del self.index[block.hash]
        if self.listener is not None:
            self.listener.removed(block.hash)
        self.num_cached -= 1
        self.ghosts[block.hash] = now
        if len(self.ghosts) > self.num_blocks:
            self.ghosts.popitem(last=False)
        parent_hash, block.hash, block.parent_hash, block.heat = block.parent_hash, None, None, 0
        if self.leaf_first and parent_hash is not None:
            left = self._num_children[parent_hash] - 1
            if left:
                self._num_children[parent_hash] = left
            else:
                del self._num_children[parent_hash]
                parent = self.index.get(parent_hash)
                if parent is not None and self._cached(parent):
                    heapq.heappush(self._heap, (parent.last_use, parent.id))
        return block
