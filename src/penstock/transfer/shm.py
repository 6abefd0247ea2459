"""The shared-memory link: a ring that both processes map carries the stream, a unix socket says how full it is.

The receiver makes the ring. It has no name (a sealed memfd; elsewhere a file that is unlinked at once) and goes to the
sender as a descriptor, so that it ends with its last process, killed or not, and nobody can shrink it under another's
feet. Only counts on the socket are believed, and only within the ring's size; what is in the ring may change at any
time, and is checked once it is in the pool.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import socket
import stat
import tempfile

from penstock.transfer.cursor import pour
from penstock.transfer.frames import Identity, LinkError, ProtocolError
from penstock.transfer.ring import MAX_RING_BYTES, SLICE_BYTES, Ring, RingIncoming
from penstock.transfer.streams import GREETING_S, PONG, WORD, Greeting, WordLine

MAX_CONNECTIONS = 32  # of one listener, a ring each


def parse(address: str) -> str:
    """The path of "shm:///path". Raises ValueError."""
    path = address.removeprefix("shm://")
    if not (address.startswith("shm://") and path.startswith("/") and len(os.fsencode(path)) < 104):
        raise ValueError(f"{address!r} is not shm:///path with a path of less than 104 bytes")
    return path


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket at the address, in place of one whose process is gone. Raises ValueError, OSError."""
    path = parse(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    return sock, address


def _remove_stale(path: str) -> None:
    """A socket file that nobody listens at any more, as a killed process leaves it. Never any other file."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)


def dial(address: str, identity: Identity) -> ShmOutgoing:
    """Connect, greet and map the ring. Raises LinkError, LinkRefused, OSError."""
    try:
        path = parse(address)
    except ValueError as error:
        raise LinkError(str(error)) from None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(GREETING_S)
        sock.connect(path)
        Greeting(sock, identity, address).dial()
        return ShmOutgoing(sock, _receive_ring(sock))
    except BaseException:
        sock.close()
        raise


def make_ring(num_bytes: int) -> tuple[int, mmap.mmap]:
    """(descriptor, memory) of a ring. The descriptor is the caller's to close."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("penstock-ring", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, num_bytes)
    return descriptor, _map(descriptor, num_bytes)


def _map(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Shared, its pages there from the beginning: else the first round, by which a link is measured, is the slowest."""
    return mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _receive_ring(sock: socket.socket) -> mmap.mmap:
    sock.settimeout(GREETING_S)
    raw, descriptors, _, _ = socket.recv_fds(sock, WORD.size, 1)
    try:
        if len(raw) != WORD.size or len(descriptors) != 1:
            raise ProtocolError("no ring came")
        (size,) = WORD.unpack(raw)
        if not 0 < size <= MAX_RING_BYTES or os.fstat(descriptors[0]).st_size != size:
            raise ProtocolError(f"a ring of {size} bytes")
        # What could shrink would kill this process at the next access.
        if hasattr(fcntl, "F_GET_SEALS") and not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("a ring that is not sealed")
        return _map(descriptors[0], size)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        sock.setblocking(False)


class ShmOutgoing:
    """`Outgoing` over a greeted socket and the ring that came over it."""

    def __init__(self, sock: socket.socket, memory: mmap.mmap) -> None:
        self._sock, self._ring, self._words = sock, Ring(memoryview(memory)), WordLine(sock)
        self._written = self._freed = 0  # bytes since the beginning
        self._answered: list[int] = []

    def write(self, views: list[memoryview]) -> int:
        self._receive()
        room = self._ring.size - (self._written - self._freed)
        taken = pour(self._ring.pieces(self._written, min(room, SLICE_BYTES)), views)
        self._written += taken
        self._words.add(taken)
        self._words.flush()
        return taken

    def replies(self) -> list[int]:
        self._receive()
        answered, self._answered = self._answered, []
        return answered

    def fileno(self) -> int:
        return self._sock.fileno()

    def events(self, writing: bool) -> int:
        return select.POLLIN | (select.POLLOUT if self._words.is_pending else 0)

    def recheck_s(self) -> float | None:
        return None

    def close(self) -> None:
        self._sock.close()

    def _receive(self) -> None:
        self._words.flush()
        for word in self._words.receive():
            if word & PONG:
                self._answered.append(word ^ PONG)
            else:
                self._freed += word
        if self._freed > self._written:
            raise ProtocolError("more was read from the ring than is written")


def incoming(sock: socket.socket, ring_bytes: int) -> RingIncoming:
    """The receiving end of a greeted socket: makes the ring and sends it. Raises OSError."""
    descriptor, memory = make_ring(ring_bytes)
    try:
        sock.settimeout(GREETING_S)
        socket.send_fds(sock, [WORD.pack(ring_bytes)], [descriptor])
    finally:
        os.close(descriptor)
    sock.setblocking(False)
    return RingIncoming(sock, Ring(memoryview(memory)))
