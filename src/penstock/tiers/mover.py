"""Copies of KV blocks between this engine's device memory and arena slots, beside the steps, in one thread.

A `Mover` (core/doors.py) for moves with one end in host memory. What it loads it checks, layer by layer, after the
copy: a slot that was damaged, or given to another block meanwhile, ends the move with an error.
Knows memory and checksums; no request, no pool, no tensor.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from penstock.config.model import KVLayout
from penstock.core.moves import DEVICE, KVMove, MoveResult, Place
from penstock.core.tiering import BAD_BLOCK, HOST
from penstock.tiers.arena import Arena
from penstock.tiers.record import Bytes

FAILED = -1  # in a progress word
MAX_WORDS = 1024  # of loads that have ended: steps in flight may still look at them
CANCELLED = "cancelled"


class TierMover:
    """`pools[layer]`: uint8 [num_blocks, layer_bytes], the memory that steps read and write.

    Within a load layers come in order. `progress(move_id)` is an int64 word: how many layers of the model are in place
    and checked, FAILED once the load has failed; a step may begin layer l when it exceeds l. Saves start at once: they
    are of committed blocks, so `after_step` must be -1.
    """

    def __init__(self, layout: KVLayout, pools: Sequence[Bytes], arena: Arena) -> None:
        self.layout = layout
        self.pools = pools
        self.arena: Arena | None = arena
        self._place_of = {layer: (g.index, n) for g in layout.groups for n, layer in enumerate(g.layers)}
        self._words: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._open: set[int] = set()  # started, result not polled
        self._cancelled: set[int] = set()
        self._loads: deque[tuple[KVMove, Arena | None]] = deque()  # go first: a request waits for each
        self._saves: deque[tuple[KVMove, Arena | None]] = deque()
        self._wakes: SimpleQueue[bool] = SimpleQueue()  # True per move that was started; False: end
        self._results: SimpleQueue[MoveResult] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="penstock-tier-mover", daemon=True)
        self._thread.start()

    def start(self, move: KVMove) -> None:
        self._open.add(move.id)
        if move.dst.where == DEVICE:
            self._words[move.id] = np.zeros(1, np.int64)
            while len(self._words) > MAX_WORDS:
                self._words.popitem(last=False)
            self._loads.append((move, self.arena))
        else:
            self._saves.append((move, self.arena))
        self._wakes.put(True)

    def use(self, arena: Arena | None) -> None:
        """Another pool's memory, or none, for moves that start from now on. Earlier ones stay with theirs."""
        self.arena = arena

    def expect(self, move_id: int, num_units: int, checksum: int) -> None:
        """Of receipts from peers; a tier has none."""

    def cancel(self, move_id: int) -> None:
        if move_id in self._open:
            self._cancelled.add(move_id)

    def poll(self) -> Sequence[MoveResult]:
        results = []
        while not self._results.empty():
            result = self._results.get()
            self._open.discard(result.id)
            self._cancelled.discard(result.id)
            results.append(result)
        return results

    def progress(self, move_id: int) -> NDArray[np.int64]:
        """[1], of a load that was started: its own array, valid as long as somebody holds it."""
        return self._words[move_id]

    def words(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Addresses [N] of the loads' words, for steps that wait for them (`runner.Loads`)."""
        return np.array([self._words[id_].ctypes.data for id_ in ids], np.int64)

    def close(self) -> None:
        """Ends after the moves that were started; their results can still be polled."""
        self._wakes.put(False)
        self._thread.join()

    # ---- the thread ----

    def _work(self) -> None:
        while self._wakes.get():
            move, arena = self._loads.popleft() if self._loads else self._saves.popleft()
            begin = time.perf_counter()
            word = self._words.get(move.id)
            try:
                if move.after_step != -1:
                    error: str | None = "a tier's move cannot wait for a step"
                elif arena is None:
                    error = "the pool is gone"
                elif word is not None and move.src.where == HOST:
                    error = self._load(move, arena, word)
                elif move.src.where == DEVICE and move.dst.where == HOST:
                    error = self._save(move, arena)
                else:
                    error = f"a tier carries nothing from {move.src.where} to {move.dst.where}"
            except Exception as problem:  # a place that names blocks which are not there: the thread must live on
                error = f"{type(problem).__name__}: {problem}"
            if error is not None and word is not None:
                word[0] = FAILED
            del arena  # one that is not used any more can go
            seconds = time.perf_counter() - begin
            if error is None:
                ids = (move.dst if move.src.where == HOST else move.src).block_ids
                num_units, num_bytes = self._size(ids)
                self._results.put(MoveResult(move.id, None, num_units, num_bytes, seconds=seconds))
            else:
                self._results.put(MoveResult(move.id, error, seconds=seconds))

    def _size(self, block_ids: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
        counts = [sum(1 for id_ in ids if id_) for ids in block_ids]
        num_units = sum(n * len(group.layers) for n, group in zip(counts, self.layout.groups, strict=True))
        return num_units, sum(n * group.block_bytes for n, group in zip(counts, self.layout.groups, strict=True))

    def _blocks(self, arena: Arena, device: Place, host: Place) -> list[list[tuple[int, Bytes, bytes]]]:
        """Per KV group (device block, record, key) of what is wanted."""
        found: list[list[tuple[int, Bytes, bytes]]] = []
        keys = iter(host.keys)
        for g, (ids, slots) in enumerate(zip(device.block_ids, host.block_ids, strict=True)):
            triples = zip(ids, slots, keys)  # `ids` end first, so the keys of later groups are left
            found.append([(id_, arena.record(g, slot), key) for id_, slot, key in triples if id_ and slot])
        return found

    def _load(self, move: KVMove, arena: Arena, word: NDArray[np.int64]) -> str | None:
        groups = self._blocks(arena, move.dst, move.src)
        sums: list[list[tuple[int, ...]]] = []
        for format_, blocks in zip(arena.formats, groups, strict=True):
            headers = [format_.header(record) for _, record, _ in blocks]
            if any(header is None or header.key != key for header, (_, _, key) in zip(headers, blocks, strict=True)):
                return BAD_BLOCK
            sums.append([header.sums for header in headers if header is not None])
        for layer, pool in enumerate(self.pools):
            if move.id in self._cancelled:
                return CANCELLED
            g, n = self._place_of[layer]
            format_ = arena.formats[g]
            for (id_, record, _), expected in zip(groups[g], sums[g], strict=True):
                row = pool[id_]
                row[:] = format_.page(record, n)
                if zlib.crc32(row.data) != expected[n]:  # of what was copied: the slot may change under our hands
                    return f"{BAD_BLOCK} (layer {layer})"
            word[0] = layer + 1
        return None

    def _save(self, move: KVMove, arena: Arena) -> str | None:
        groups = self._blocks(arena, move.src, move.dst)
        for g, (group, blocks) in enumerate(zip(self.layout.groups, groups, strict=True)):
            format_ = arena.formats[g]
            for id_, record, key in blocks:
                if move.id in self._cancelled:
                    return CANCELLED
                format_.clear(record)
                sums = []
                for n, layer in enumerate(group.layers):
                    row = self.pools[layer][id_]
                    format_.page(record, n)[:] = row
                    sums.append(zlib.crc32(row.data))
                format_.seal(record, key, tuple(sums))
        return None
