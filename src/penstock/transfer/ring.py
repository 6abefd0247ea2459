"""A stream's bytes in a ring of memory that its sender fills and its receiver empties. Knows counts and views.

Who shares the memory, or writes into it from elsewhere, is the business of the link that made it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable

from penstock.transfer.cursor import pour
from penstock.transfer.frames import ProtocolError
from penstock.transfer.streams import PONG, WordLine, wait_for

RING_BYTES = 8 << 20
MAX_RING_BYTES = 1 << 30
SLICE_BYTES = 1 << 20  # after so much the other end is told, so that both copy at the same time
COMING = 1 << 62  # a sender's word: so many bytes are on their way; those without it count what is there
PUMP_S = (2e-5, 1e-3)  # between two looks at what is on its way: at first, and when it does not come


class Ring:
    """Bytes of the stream from `start` on lie in at most two pieces of the memory."""

    def __init__(self, view: memoryview) -> None:
        self.size = len(view)
        self._view = view

    def pieces(self, start: int, num_bytes: int) -> list[memoryview]:
        begin = start % self.size
        first = min(num_bytes, self.size - begin)
        return [self._view[begin : begin + first], self._view[: num_bytes - first]]


class RingIncoming:
    """`Incoming` out of a ring. Only counts on the socket are believed, and only within the ring's size.

    `pump`: for a link whose bytes move only while this end looks after them. It is called while the sender has said
    that some are on their way, so that a link at rest costs no processor. `release`: what closing is beside the socket.
    """

    def __init__(
        self,
        sock: socket.socket,
        ring: Ring,
        pump: Callable[[], None] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._sock, self._ring, self._pump, self._words = sock, ring, pump, WordLine(sock)
        self._release = release
        self._read = self._ready = 0  # bytes read since the beginning, and written but not read
        self._coming = 0  # bytes that were announced and are not ready
        self._untold = 0  # bytes read that the sender does not know of
        self._pause_s = PUMP_S[0]

    def read(self, views: list[memoryview]) -> int:
        if not self._ready:
            self._hear()
        taken = pour(views, self._ring.pieces(self._read, min(self._ready, SLICE_BYTES)))
        self._read += taken
        self._ready -= taken
        self._untold += taken
        if self._untold >= self._ring.size // 8:
            self._tell()
        return taken

    def reply(self, ping_id: int) -> None:
        self._words.send(PONG | ping_id)

    def wait(self) -> None:
        self._tell()
        if self._pump is not None and self._coming:
            self._pump()
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, PUMP_S[1])
        else:
            wait_for(self._sock, select.POLLIN | (select.POLLOUT if self._words.is_pending else 0))

    def close(self) -> None:
        self._sock.close()
        if self._release is not None:
            self._release()

    def _hear(self) -> None:
        for word in self._words.receive():
            if word & COMING and self._pump is not None:
                self._coming += word ^ COMING
            else:
                self._ready += word
                self._coming -= word if self._pump is not None else 0
                self._pause_s = PUMP_S[0]
        if self._ready > self._ring.size or not 0 <= self._coming <= self._ring.size:
            raise ProtocolError("more was written into the ring than it holds")

    def _tell(self) -> None:
        self._words.add(self._untold)
        self._untold = 0
        with contextlib.suppress(ConnectionError):  # a sender that has gone: what it left in the ring is still read
            self._words.flush()
