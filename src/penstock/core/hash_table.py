"""A map of 64-bit keys to small numbers in two arrays: some 20 to 30 bytes per entry where a dict takes a hundred.

Everything is asked and told in batches. Knows nothing of what keys and values mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Values = NDArray[np.uint32]

WAYS = 8  # entries of a bucket: one cache line of keys
MAX_LOAD = 0.6  # of the slots; 1.7 % of the entries spill at it
GROWTH = 1.5


class HashTable:
    """Buckets of eight; what does not fit into its bucket goes to a dict beside them. A value of 0 means: not there.

    Keys must be evenly spread (digests are), not 0, and distinct within one `put`. `num_entries` to start with: growing
    moves everything, 0.4 us an entry.
    """

    def __init__(self, num_entries: int = 4096) -> None:
        self._allocate(int(num_entries / MAX_LOAD) // WAYS + 1)

    def _allocate(self, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        # [num_buckets, WAYS] each; a bucket's keys and values lie side by side, for memory is what a look costs.
        self._buckets = np.zeros((num_buckets, WAYS + WAYS // 2), np.uint64)
        self.keys, self.values = self._buckets[:, :WAYS], self._buckets[:, WAYS:].view(np.uint32)
        self.spilled: dict[int, int] = {}
        self._overflowed = np.zeros(num_buckets, bool)  # something of this bucket was spilled since the table grew
        self.num_entries = 0

    @property
    def num_bytes(self) -> int:
        """Of the arrays, and an estimate of the dict."""
        return self._buckets.nbytes + self._overflowed.nbytes + 130 * len(self.spilled)

    def get(self, keys: Keys) -> Values:
        """The values, 0 where a key is not there. Shapes [N]."""
        buckets = (keys % np.uint64(self.num_buckets)).astype(np.int64)
        seen = self._buckets[buckets]
        equal = seen[:, :WAYS] == keys[:, None]
        # At most one way is equal, so the sum of products is that way's value, or 0.
        values = seen[:, WAYS:].view(np.uint32)
        found: Values = np.einsum("nw,nw->n", values, equal, dtype=np.uint32, casting="unsafe")
        if self.spilled:
            for i in (self._overflowed[buckets] & (found == 0)).nonzero()[0].tolist():
                found[i] = self.spilled.get(int(keys[i]), 0)
        return found

    def put(self, keys: Keys, values: Values) -> None:
        """Insert, change or, with value 0, take out."""
        if self.num_entries + len(keys) > MAX_LOAD * WAYS * self.num_buckets:
            self._grow(self.num_entries + len(keys))
        buckets = (keys % np.uint64(self.num_buckets)).astype(np.int64)
        equal = self.keys[buckets] == keys[:, None]
        there = equal.any(axis=1)
        if there.any():
            at, ways, new = buckets[there], equal[there].argmax(axis=1), values[there]
            self.values[at, ways] = new
            gone = new == 0
            if gone.any():
                self.keys[at[gone], ways[gone]] = 0
                self.num_entries -= int(gone.sum())
        left = np.flatnonzero(~there)
        if self.spilled:
            left = self._change_spilled(keys, values, left, self._overflowed[buckets[left]])
        left = left[values[left] != 0]
        while left.size:
            _, first = np.unique(buckets[left], return_index=True)  # one per bucket and round
            chosen = left[first]
            free = self.keys[buckets[chosen]] == 0
            fits = free.any(axis=1)
            into, ways = chosen[fits], free[fits].argmax(axis=1)
            self.keys[buckets[into], ways] = keys[into]
            self.values[buckets[into], ways] = values[into]
            for i in chosen[~fits].tolist():
                self.spilled[int(keys[i])] = int(values[i])
                self._overflowed[buckets[i]] = True
            self.num_entries += len(chosen)
            left = np.delete(left, first)

    def _change_spilled(
        self, keys: Keys, values: Values, left: NDArray[np.int64], suspected: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Change those of `left` that are in the dict; the indices of the others."""
        others = np.ones(len(left), bool)
        for n in np.flatnonzero(suspected).tolist():
            key, value = int(keys[left[n]]), int(values[left[n]])
            if key not in self.spilled:
                continue
            others[n] = False
            if value:
                self.spilled[key] = value
            else:
                del self.spilled[key]
                self.num_entries -= 1
        return left[others]

    def _grow(self, num_entries: int) -> None:
        keys, values, spilled = self.keys, self.values, self.spilled
        self._allocate(int(max(num_entries, GROWTH * MAX_LOAD * WAYS * len(keys)) / MAX_LOAD) // WAYS + 1)
        for start in range(0, len(keys), 1 << 16):
            part = values[start : start + (1 << 16)]
            self.put(keys[start : start + (1 << 16)][part != 0], part[part != 0])
        if spilled:
            self.put(np.array(list(spilled), np.uint64), np.array(list(spilled.values()), np.uint32))
