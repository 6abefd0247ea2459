"""One send-move cut into frames: which layers may go, what a frame of them holds. Knows memory and the step counter."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from penstock.core.moves import KVMove
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import MAX_FRAME_BYTES, MAX_RUNS, Data, header_bytes, pack_runs
from penstock.transfer.memory import MASK, Ids, KVMemory, runs_of


@dataclass(slots=True)
class Frame:
    """One message, ready to go."""

    header: bytes
    views: list[memoryview]
    num_units: int
    num_bytes: int
    checksum: int


@dataclass(slots=True, eq=False)
class Sending:
    """One send-move on its way. `cancelled` may be set by anybody, all else belongs to its Sender."""

    move: KVMove
    memory: KVMemory
    begin: float
    src: list[Ids] = field(init=False)  # per KV group, wanted blocks only
    dst: list[Ids] = field(init=False)
    layers: list[int] = field(init=False)  # with something to send, in the order they are computed
    num_layers_sent: int = 0
    num_parts: int = 0
    cancelled: bool = False
    ended: bool = False
    computed_at: float | None = None  # its last layer was seen done
    busy_s: float = 0.0
    num_units: int = 0
    num_bytes: int = 0
    checksum: int = 0

    def __post_init__(self) -> None:
        src = [np.asarray(ids, np.int64) for ids in self.move.src.block_ids]
        dst = [np.asarray(ids, np.int64) for ids in self.move.dst.block_ids]
        self.src = [ids[there != 0] for ids, there in zip(src, dst)]
        self.dst = [there[there != 0] for there in dst]
        self.layers = [n for n in range(self.memory.num_layers) if len(self.dst[self.memory.group_of[n]])]

    def layer_bytes(self, layer: int) -> int:
        return len(self.dst[self.memory.group_of[layer]]) * self.memory.layer_bytes[layer]

    def num_computed(self, counter: StepCounter, now: float) -> int:
        """How many of `layers` may be sent."""
        total = len(self.layers)
        if self.move.after_step >= 0:
            total = bisect.bisect_left(self.layers, counter.layers_done(self.move.after_step))
        if total == len(self.layers) and self.computed_at is None:
            self.computed_at = now
        return total

    def batch(self, num_computed: int, min_bytes: float) -> list[int]:
        """The layers of the next message: until `min_bytes` are together or the last layer is; []: not yet."""
        num_bytes = 0
        for end in range(self.num_layers_sent, num_computed):
            num_bytes += self.layer_bytes(self.layers[end])
            if num_bytes >= min_bytes or end == len(self.layers) - 1:
                return self.layers[self.num_layers_sent : end + 1]
        return []

    def frames(self, layers: list[int]) -> Iterator[Frame]:
        """These layers as frames, one unless that would be too large."""
        pieces: list[tuple[int, int, int]] = []  # layer, wanted blocks [start, end)
        num_bytes = num_blocks = 0
        for layer in layers:
            size, count = self.memory.layer_bytes[layer], len(self.dst[self.memory.group_of[layer]])
            stride = max(1, min(MAX_FRAME_BYTES // size, MAX_RUNS))
            for start in range(0, count, stride):
                end = min(start + stride, count)
                if pieces and (
                    num_bytes + (end - start) * size > MAX_FRAME_BYTES or num_blocks + end - start > MAX_RUNS
                ):
                    yield self._frame(pieces)
                    pieces, num_bytes, num_blocks = [], 0, 0
                pieces.append((layer, start, end))
                num_bytes += (end - start) * size
                num_blocks += end - start
        yield self._frame(pieces)

    def _frame(self, pieces: list[tuple[int, int, int]]) -> Frame:
        views: list[memoryview] = []
        runs: list[tuple[int, int, int]] = []
        num_units = checksum = 0
        for layer, start, end in pieces:
            group = self.memory.group_of[layer]
            src, dst = self.src[group][start:end], self.dst[group][start:end]
            views += self.memory.scatter(layer, src)
            runs += [(layer, first, count) for first, count in runs_of(dst)]
            num_units += end - start
            checksum += self.memory.checksum(layer, src, dst)
        move = self.move
        header = Data(move.transfer_id, move.epoch, move.id, self.num_parts, pack_runs(runs))
        self.num_parts += 1
        return Frame(header_bytes(header), views, num_units, sum(map(len, views)), checksum & MASK)
