"""A pretended tier beside the engines: which blocks a shared pool holds. Least recently used blocks leave first.

Knows hashes. Time is the fleet's: a block that is stored can be loaded at once, and the load takes what the cost model
says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from penstock.core.kv_events import KVEventSource


class SimPool:
    """At most `num_blocks` blocks, told of by `events` as tier "remote"."""

    def __init__(self, name: str, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.events = KVEventSource(name, 0, tuple)
        self.events.add_tier("remote", lambda: self._held)
        self._held: OrderedDict[bytes, None] = OrderedDict()

    def store(self, hashes: Iterable[bytes]) -> None:
        """Take blocks in; what is there already becomes young again."""
        for hash_ in hashes:
            if hash_ in self._held:
                self._held.move_to_end(hash_)
                continue
            if len(self._held) >= self.num_blocks:
                self.events.removed(self._held.popitem(last=False)[0], "remote")
            self._held[hash_] = None
            self.events.stored(hash_, "remote")

    def run(self, hashes: Sequence[bytes]) -> int:
        """How many of these, from the first on, it has; they become young."""
        for n, hash_ in enumerate(hashes):
            if hash_ not in self._held:
                return n
            self._held.move_to_end(hash_)
        return len(hashes)
