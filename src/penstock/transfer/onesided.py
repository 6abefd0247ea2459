"""Links whose sender writes into registered memory of the receiver: what those over NIXL and over Mooncake share.

Each connection has a ring of its own at the receiver, and one like it at the sender. What is to go is copied into the
sender's, one call carries it to the same place in the receiver's, and from there it is copied into the pool as from
shared memory: after transfer, epoch and blocks were checked. The pool is never registered, so nobody else can write
into it. That is on purpose. The other way, registering the pool and invalidating that before a block is reused, holds
only where a network card checks every write: over the transports that a machine without one has, NIXL 1.5 carries a
write to memory that is not registered any more, and it lands (tests/transfer/test_onesided.py). For the same reason a
ring is given to nobody else after its connection, and its addresses are not used again while the process lives: a
writer that wakes up late finds memory that nobody reads.

A socket, greeted as that of the TCP link, says where the ring is and how full it is. Notifications of the libraries are
not used: they cannot be waited for along with other things, and whoever reaches a library's own port may send them.
"""

from __future__ import annotations

import mmap
import select
import socket
import time
from collections import deque
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from penstock.transfer import tcp
from penstock.transfer.cursor import pour
from penstock.transfer.frames import Identity, LinkError, ProtocolError
from penstock.transfer.ring import COMING, MAX_RING_BYTES, SLICE_BYTES, Ring, RingIncoming
from penstock.transfer.streams import GREETING_S, PONG, Greeting, WordLine, hear, say

MAX_CONNECTIONS = 32  # of one listener, a ring each
MAX_WRITES = 8  # on their way at a time
MAX_PLACE_BYTES = 256 << 10  # of what a library wants to be known about the receiver: hundreds of bytes for each card
RECHECK_S = 5e-5  # between two looks at writes on their way


class Staging:
    """Memory for one ring: `num_bytes` bytes at `address`, zeros, its pages there from the beginning (as in shm.py)."""

    def __init__(self, num_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
        self._memory = mmap.mmap(-1, num_bytes, flags=flags)
        self.num_bytes = num_bytes
        self.view = memoryview(self._memory)
        self.address = int(np.frombuffer(self.view, np.uint8).ctypes.data)

    def retire(self) -> None:
        """Give the memory back to the system and keep its addresses, so that a late write can harm nobody."""
        self._memory.madvise(mmap.MADV_DONTNEED)
        _retired.append(self._memory)


_retired: list[mmap.mmap] = []


class Target(Protocol):
    """A library at the receiving end: it has registered one `Staging`."""

    def place(self) -> bytes:
        """What a writer must know of this end."""
        ...

    def pump(self) -> None:
        """Carry on what others write. Never waits."""
        ...

    def close(self) -> None:
        """Take the registration back. Never raises."""
        ...


class Writer(Protocol):
    """A library at the sending end: writes from one `Staging` to the same place in the receiver's."""

    def start(self, offset: int, num_bytes: int) -> Any:
        """Begin a write; what `is_done` takes. Raises LinkError."""
        ...

    def is_done(self, write: Any) -> bool:
        """Whether it is in the receiver's memory. Asked until True, then never again. Raises LinkError."""
        ...

    def close(self) -> None:
        """Give up what is on its way. Never raises."""
        ...


class Library(Protocol):
    """What a link needs of one."""

    scheme: str

    def target(self, staging: Staging, host: str) -> Target:
        """Raises LinkError. `host`: the address of this machine at which the other end has reached it."""
        ...

    def writer(self, staging: Staging, host: str, place: bytes, address: int) -> Writer:
        """To the `Staging` at `address`. Raises LinkError."""
        ...


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """The receiver's ring, as its sender must know it."""

    num_bytes: Annotated[int, Meta(ge=1, le=MAX_RING_BYTES)]
    address: Annotated[int, Meta(ge=0, le=(1 << 62) - 1)]
    place: Annotated[bytes, Meta(max_length=MAX_PLACE_BYTES)]


def listen(scheme: str, address: str) -> tuple[socket.socket, str]:
    """As `tcp.listen`, under another name."""
    sock, found = tcp.listen(_as_tcp(scheme, address))
    return sock, found.replace("tcp", scheme, 1)


def _as_tcp(scheme: str, address: str) -> str:
    if not address.startswith(f"{scheme}://"):
        raise ValueError(f"{address!r} is not {scheme}://host:port")
    return address.replace(scheme, "tcp", 1)


def dial(library: Library, address: str, identity: Identity) -> OneSidedOutgoing:
    """Connect, greet, and have the library find the ring. Raises LinkError, LinkRefused, OSError."""
    try:
        place = tcp.parse(_as_tcp(library.scheme, address))
    except ValueError as error:
        raise LinkError(str(error)) from None
    sock = socket.create_connection(place, timeout=tcp.CONNECT_S)
    try:
        tcp.prepare(sock)
        Greeting(sock, identity, address).dial()
        offer = hear(sock, Offer, time.monotonic() + GREETING_S, 2 * MAX_PLACE_BYTES)
        sock.setblocking(False)
        staging = Staging(offer.num_bytes)
        writer = library.writer(staging, sock.getsockname()[0], offer.place, offer.address)
    except BaseException:
        sock.close()
        raise
    return OneSidedOutgoing(sock, staging, writer)


def incoming(library: Library, sock: socket.socket, ring_bytes: int) -> RingIncoming:
    """The receiving end of a greeted socket: registers a ring and offers it. Raises LinkError, OSError."""
    tcp.prepare(sock)
    staging = Staging(ring_bytes)
    target = library.target(staging, sock.getsockname()[0])

    def release() -> None:
        target.close()
        staging.retire()

    try:
        offer = Offer(staging.num_bytes, staging.address, target.place())
        say(sock, offer, time.monotonic() + GREETING_S)
        sock.setblocking(False)
    except BaseException:
        release()
        raise
    return RingIncoming(sock, Ring(staging.view), target.pump, release)


class OneSidedOutgoing:
    """`Outgoing` over a greeted socket and a library that writes."""

    def __init__(self, sock: socket.socket, staging: Staging, writer: Writer) -> None:
        self._sock, self._staging, self._writer = sock, staging, writer
        self._ring, self._words = Ring(staging.view), WordLine(sock)
        self._written = self._freed = 0  # bytes since the beginning
        self._writes: deque[tuple[Any, int]] = deque()  # on their way, with their bytes
        self._answered: list[int] = []

    def write(self, views: list[memoryview]) -> int:
        self._look()
        room = self._ring.size - (self._written - self._freed)
        if len(self._writes) >= MAX_WRITES:
            return 0
        pieces = self._ring.pieces(self._written, min(room, SLICE_BYTES))
        taken = pour(pieces[:1], views)  # one piece: what is behind the ring's end begins the next write
        if taken:
            self._words.send(COMING | taken)
            write = self._writer.start(self._written % self._ring.size, taken)
            self._writes.append((write, taken))
            self._written += taken
            self._look()
        return taken

    def replies(self) -> list[int]:
        self._look()
        answered, self._answered = self._answered, []
        return answered

    def fileno(self) -> int:
        return self._sock.fileno()

    def events(self, writing: bool) -> int:
        return select.POLLIN | (select.POLLOUT if self._words.is_pending else 0)

    def recheck_s(self) -> float | None:
        return RECHECK_S if self._writes else None

    def close(self) -> None:
        self._sock.close()
        self._writer.close()
        self._staging.retire()

    def _look(self) -> None:
        """What has arrived there, in order, and what the other end says."""
        while self._writes and self._writer.is_done(self._writes[0][0]):
            self._words.add(self._writes.popleft()[1])
        self._words.flush()
        for word in self._words.receive():
            if word & PONG:
                self._answered.append(word ^ PONG)
            else:
                self._freed += word
        if self._freed > self._written:
            raise ProtocolError("more was read from the ring than is written")
