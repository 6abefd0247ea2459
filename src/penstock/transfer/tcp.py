"""The TCP link: bytes go from the sender's pool into the kernel, and from the kernel into the receiver's pool."""

from __future__ import annotations

import select
import socket
import sys

from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.streams import PONG, Greeting, WordLine, wait_for

CONNECT_S = 5.0
MAX_CONNECTIONS = 256  # of one listener
LOST_S = 10  # silence after which a peer whose machine has vanished counts as gone


def parse(address: str) -> tuple[str, int]:
    """(host, port) of "tcp://host:port", the host of IPv6 in brackets. Raises ValueError."""
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not (address.startswith("tcp://") and colon and host and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"{address!r} is not tcp://host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r}: an IPv6 address stands in brackets, tcp://[host]:port")
    return host, int(port)


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its address; port 0 becomes a free one. Raises ValueError, OSError."""
    host, port = parse(address)
    family, kind, number, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    shown = f"[{host}]" if ":" in host else host
    return sock, f"tcp://{shown}:{sock.getsockname()[1]}"


def dial(address: str, identity: Identity) -> TcpOutgoing:
    """Connect and greet. Raises LinkError, LinkRefused, OSError."""
    try:
        sock = socket.create_connection(parse(address), timeout=CONNECT_S)
    except ValueError as error:
        raise LinkError(str(error)) from None
    try:
        prepare(sock)
        Greeting(sock, identity, address).dial()
    except BaseException:
        sock.close()
        raise
    return TcpOutgoing(sock)


def incoming(sock: socket.socket, ring_bytes: int) -> TcpIncoming:
    """The receiving end of a greeted socket."""
    prepare(sock)
    return TcpIncoming(sock)


def prepare(sock: socket.socket) -> None:
    """Small messages at once; a peer that vanished without a word is noticed, while sending and while idle.

    Buffers are left to the kernel, which adapts them to bandwidth and delay up to megabytes: a size set by hand ends
    that, is cut to net.core.wmem_max (often 208 KiB), and made no difference here where it was not.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_S // 3)


class TcpOutgoing:
    """`Outgoing` over a greeted socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._words = WordLine(sock)

    def write(self, views: list[memoryview]) -> int:
        try:
            return self._sock.sendmsg(views)
        except BlockingIOError:
            return 0

    def replies(self) -> list[int]:
        return [word ^ PONG for word in self._words.receive() if word & PONG]

    def fileno(self) -> int:
        return self._sock.fileno()

    def events(self, writing: bool) -> int:
        return select.POLLIN | (select.POLLOUT if writing else 0)

    def recheck_s(self) -> float | None:
        return None

    def close(self) -> None:
        self._sock.close()


class TcpIncoming:
    """`Incoming` over a greeted socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._words = WordLine(sock)

    def read(self, views: list[memoryview]) -> int:
        try:
            num_bytes = self._sock.recvmsg_into(views)[0]
        except BlockingIOError:
            return 0
        if not num_bytes:
            raise EOFError("the connection was closed")
        return num_bytes

    def reply(self, ping_id: int) -> None:
        self._words.send(PONG | ping_id)

    def wait(self) -> None:
        wait_for(self._sock, select.POLLIN | (select.POLLOUT if self._words.is_pending else 0))
        self._words.flush()

    def close(self) -> None:
        self._sock.close()
