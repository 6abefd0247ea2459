"""The receiving end: what is awaited, and a reader that puts a stream's bytes where they belong, or nowhere.

A frame is checked against transfer, epoch and reserved blocks before its first byte enters a pool, and each slice of
it is copied under its receipt's lock: once a receipt has ended no byte of it is written any more. Knows no socket.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from penstock.core.moves import KVMove, MoveResult
from penstock.transfer.cursor import Cursor
from penstock.transfer.frames import (
    ABANDONED,
    LENGTH,
    WHOLE,
    Data,
    Ping,
    ProtocolError,
    parse_header,
    parse_length,
    parse_runs,
)
from penstock.transfer.memory import MASK, KVMemory

SLICE_BYTES = 1 << 20  # copied under one hold of a receipt's lock
MAX_REPEATS = 4  # a receipt takes so many times its own units before it is clear that somebody errs

Copy = Callable[[list[memoryview]], int]  # fills the views from their beginning; bytes written, 0: none are there yet


class Receipt:
    """One receive-move. Any thread may call anything; only `fill` and `count` may wait, for another frame's slice.

    It ends by itself, once, and then calls `post` with its result: when `expect` and what has arrived agree, when they
    cannot agree any more, or when it is cancelled.
    """

    def __init__(self, move: KVMove, memory: KVMemory, post: Callable[[MoveResult], None]) -> None:
        self.move, self._memory, self._post = move, memory, post
        self._lock = threading.Lock()
        self._reserved = [frozenset(ids) - {0} for ids in move.dst.block_ids]
        layers = [len(group.layers) for group in memory.layout.groups]
        self._max_units = MAX_REPEATS * sum(len(ids) * n for ids, n in zip(self._reserved, layers))
        self._seen: set[tuple[int, int]] = set()
        self._expected: tuple[int, int] | None = None
        self._failure: str | None = None
        self._begin = time.monotonic()
        self.ended = False
        self.num_units = self.num_bytes = self.checksum = 0

    def expect(self, num_units: int, checksum: int) -> None:
        self._expected = (num_units, checksum & MASK)
        self._settle()

    def fail(self, reason: str) -> None:
        """End it without waiting; the first reason counts. If a slice is being copied, right after that slice."""
        self._failure = self._failure or reason
        self._settle()

    def was_counted(self, frame: Data) -> bool:
        return (frame.move, frame.part) in self._seen

    def holds(self, runs: NDArray[np.int64]) -> bool:
        """Were all these blocks reserved for this receipt?"""
        group_of = self._memory.group_of
        return all(
            self._reserved[group_of[layer]].issuperset(range(first, first + count))
            for layer, first, count in runs.tolist()
        )

    def fill(self, cursor: Cursor, copy: Copy) -> int | None:
        """Let `copy` write the next slice of a frame into the pool; None: ended, nothing was written."""
        with self._lock:
            if self.ended:
                return None
            num_bytes = copy(cursor.window(SLICE_BYTES))
            cursor.advance(num_bytes)
        self._settle()
        return num_bytes

    def count(self, frame: Data, runs: NDArray[np.int64], num_bytes: int) -> bool:
        """A whole frame has been filled in; False if it does not count: ended, or counted before."""
        total = 0
        for layer in np.unique(runs[:, 0]).tolist():
            mine = runs[runs[:, 0] == layer]
            total += self._memory.checksum(layer, ids_of(mine[:, 1], mine[:, 2]))
        with self._lock:
            if self.ended or self.was_counted(frame):
                return False
            self._seen.add((frame.move, frame.part))
            self.num_units += int(runs[:, 2].sum())
            self.num_bytes += num_bytes
            self.checksum = (self.checksum + total) & MASK
        self._settle()
        return True

    def _verdict(self) -> str | None:
        """Why it ends now: "" because all is in place, else the error; None: it does not end yet."""
        # Complete is complete: a cancel that comes at the same time does not undo it.
        if self._failure is not None and self._expected != (self.num_units, self.checksum):
            return self._failure
        if self.num_units > self._max_units:
            return f"too much came: {self.num_units} units, more than {MAX_REPEATS} times what was reserved"
        if self._expected is None:
            return None
        num_units, checksum = self._expected
        if self.num_units > num_units:
            return f"too much came: {self.num_units} units instead of {num_units}"
        if self.num_units < num_units:
            return None
        if self.checksum != checksum:
            return f"the checksum of {num_units} units is {self.checksum:016x}, not {checksum:016x} as sent"
        return ""

    def _settle(self) -> None:
        """End if it is time, without waiting: who holds the lock looks again after releasing it."""
        while not self.ended and self._verdict() is not None and self._lock.acquire(blocking=False):
            try:
                verdict = self._verdict()
                ends = verdict is not None and not self.ended
                self.ended = self.ended or ends
            finally:
                self._lock.release()
            if ends:
                seconds = time.monotonic() - self._begin
                sizes = (self.num_units, self.num_bytes, self.checksum)
                self._post(MoveResult(self.move.id, verdict or None, *sizes, seconds))


class Receipts:
    """All receipts of one rank, found by transfer and epoch. Any thread may call anything."""

    def __init__(self, memory: KVMemory, post: Callable[[MoveResult], None]) -> None:
        self.memory, self._post = memory, post
        self._by_transfer: dict[tuple[str, int], Receipt] = {}
        self._by_move: dict[int, Receipt] = {}
        self._lock = threading.Lock()  # never held while anything waits
        self._counts: Counter[str] = Counter()

    def start(self, move: KVMove) -> None:
        """Await a move. One that cannot be awaited ends at once."""
        key = (move.transfer_id, move.epoch)
        receipt = Receipt(move, self.memory, self._ended)
        with self._lock:
            taken = key in self._by_transfer
            if not taken:
                self._by_transfer[key] = self._by_move[move.id] = receipt
        if taken:
            self._post(MoveResult(move.id, f"transfer {move.transfer_id} of epoch {move.epoch} is awaited already"))

    def of_move(self, move_id: int) -> Receipt | None:
        with self._lock:
            return self._by_move.get(move_id)

    def of_frame(self, frame: Data) -> Receipt | None:
        with self._lock:
            return self._by_transfer.get((frame.transfer_id, frame.epoch))

    def fail_all(self, reason: str) -> None:
        with self._lock:
            receipts = list(self._by_move.values())
        for receipt in receipts:
            receipt.fail(reason)

    def note(self, what: str) -> None:
        """Count a frame."""
        with self._lock:
            self._counts[what] += 1

    def counts(self) -> Counter[str]:
        """Frames so far, by what became of them."""
        with self._lock:
            return Counter(self._counts)

    def _ended(self, result: MoveResult) -> None:
        with self._lock:
            receipt = self._by_move.pop(result.id)
            del self._by_transfer[receipt.move.transfer_id, receipt.move.epoch]
        self._post(result)


class FrameReader:
    """Turns one sender's stream into bytes in the pool. `take` by `take`; never asks for more than it has room for.

    Raises ProtocolError for a stream that cannot be followed any more: close it. A frame of an unknown transfer, of
    another epoch, for blocks that are not reserved, or that was counted already is read to its end and dropped.
    """

    def __init__(self, receipts: Receipts, sender: str, reply: Callable[[int], None]) -> None:
        self._receipts, self._sender, self._reply = receipts, sender, reply
        self._length, self._closing = bytearray(LENGTH.size), bytearray(1)
        self._drain = memoryview(bytearray(64 << 10))
        self._header = bytearray()
        self._ping: Ping | None = None
        self._frame: Data | None = None
        self._runs = np.empty((0, 3), np.int64)
        self._num_bytes = 0
        self._receipt: Receipt | None = None  # None in a payload: drop it
        self._cursor = Cursor([memoryview(self._length)])
        self._next: Callable[[], None] = self._begin_header
        self._num_dropped = 0  # bytes of payload still to be dropped

    def take(self, copy: Copy) -> int:
        """Have `copy` write what comes next where it belongs; its number of bytes."""
        if self._receipt is not None:
            taken = self._receipt.fill(self._cursor, copy)
            if taken is None:  # ended meanwhile
                self._receipts.note("late")
                self._drop(self._cursor.num_left)
                return self.take(copy)
        elif self._num_dropped:
            taken = copy([self._drain[: self._num_dropped]])
            self._num_dropped -= taken
        else:
            taken = copy(self._cursor.window(SLICE_BYTES))
            self._cursor.advance(taken)
        while not self._num_dropped and not self._cursor.num_left:
            self._next()
        return taken

    def _expect(self, buffer: bytearray, then: Callable[[], None]) -> None:
        self._cursor, self._next = Cursor([memoryview(buffer)]), then

    def _drop(self, num_bytes: int) -> None:
        self._receipt, self._cursor, self._num_dropped = None, Cursor([]), num_bytes

    def _begin_header(self) -> None:
        self._header = bytearray(parse_length(self._length))
        self._expect(self._header, self._begin_payload)

    def _begin_payload(self) -> None:
        header = parse_header(self._header)
        self._next = self._begin_closing
        if isinstance(header, Ping):
            self._ping = header
            self._drop(header.num_bytes)
            return
        memory = self._receipts.memory
        self._runs, self._num_bytes = parse_runs(header.runs, memory.layer_bytes)
        self._frame = header
        receipt = self._receipts.of_frame(header)
        if receipt is None:
            self._receipts.note("unknown")
        elif receipt.was_counted(header):
            self._receipts.note("duplicate")
        elif not receipt.holds(self._runs):
            self._receipts.note("unreserved")
            receipt.fail(f"{self._sender} sent blocks that were not reserved for transfer {header.transfer_id}")
        else:
            views: list[memoryview] = []
            for layer, first, count in self._runs.tolist():
                views += memory.scatter_runs(layer, [(first, count)])
            self._receipt, self._cursor = receipt, Cursor(views)
            return
        self._drop(self._num_bytes)

    def _begin_closing(self) -> None:
        receipt, self._receipt = self._receipt, None
        self._expect(self._closing, lambda: self._end(receipt))

    def _end(self, receipt: Receipt | None) -> None:
        closing = bytes(self._closing)
        if closing not in (WHOLE, ABANDONED):
            raise ProtocolError(f"a frame that closes with {closing!r}")
        if self._ping is not None:
            ping, self._ping = self._ping, None
            self._reply(ping.id)
        elif receipt is not None and self._frame is not None:
            if closing == ABANDONED:
                self._receipts.note("abandoned")
            elif receipt.count(self._frame, self._runs, self._num_bytes):
                self._receipts.note("whole")
            else:
                self._receipts.note("uncounted")
        self._frame = None
        self._expect(self._length, self._begin_header)


def ids_of(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Runs as single ids, in order."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    ids: NDArray[np.int64] = np.arange(total, dtype=np.int64) + np.repeat(first - (ends - counts), counts)
    return ids
