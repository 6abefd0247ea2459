"""One connection as two ends of a stream of bytes, whatever carries it; and how two processes greet each other on it.

Knows sockets. Does not know frames: what is in the stream is `FrameReader`'s business.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import Protocol, TypeVar

import msgspec

from penstock.transfer.frames import (
    LENGTH,
    MAGIC,
    MAX_GREETING_BYTES,
    NONCE_BYTES,
    VERSION,
    Hello,
    Identity,
    LinkError,
    LinkRefused,
    Proof,
    ProtocolError,
    Verdict,
    accept,
    judge,
    prove,
    transcript,
)

GREETING_S = 5.0  # for all of it, from the first byte
WORD = struct.Struct("<Q")
PONG = 1 << 63  # a word that answers a ping; the others count bytes
MAX_UNSENT_BYTES = 4096  # of words to somebody who does not read them


class Outgoing(Protocol):
    """The sender's end. No method waits; OSError, EOFError or LinkError: the connection is gone."""

    def write(self, views: list[memoryview]) -> int:
        """Bytes taken of the views, from their beginning; 0: no room. What was taken is not read again."""
        ...

    def replies(self) -> list[int]:
        """Ids of pings that were answered since the last call."""
        ...

    def fileno(self) -> int:
        """To poll; -1: nothing to wait for, there is always room."""
        ...

    def events(self, writing: bool) -> int:
        """What to poll for: until there may be room, or only until something comes back."""
        ...

    def recheck_s(self) -> float | None:
        """When to ask again though nothing stirs to be polled: while something is on its way; None: it need not be."""
        ...

    def close(self) -> None: ...


class Incoming(Protocol):
    """The receiver's end."""

    def read(self, views: list[memoryview]) -> int:
        """Fill the views from their beginning; bytes read, 0: none are there. EOFError: none will come."""
        ...

    def reply(self, ping_id: int) -> None: ...

    def wait(self) -> None:
        """Until there may be something to read."""
        ...

    def close(self) -> None: ...


class WordLine:
    """8-byte words both ways over a socket that does not block: counts of bytes, which add up, and answers to pings."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._out, self._in = bytearray(), bytearray()
        self._count = 0

    @property
    def is_pending(self) -> bool:
        return bool(self._out or self._count)

    def add(self, count: int) -> None:
        """Tell a count, at the next `flush`, as a sum of all that are not told yet."""
        self._count += count

    def send(self, word: int) -> None:
        self._out += WORD.pack(word)
        if len(self._out) > MAX_UNSENT_BYTES:
            raise ProtocolError("the other end does not read answers")
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        if self._count and not self._out:
            self._out += WORD.pack(self._count)
            self._count = 0
        while self._out:
            try:
                del self._out[: self._sock.send(self._out)]
            except BlockingIOError:
                return

    def receive(self) -> list[int]:
        """Words that have come. EOFError: the other end has gone."""
        while True:
            try:
                raw = self._sock.recv(4096)
            except BlockingIOError:
                break
            if not raw:
                if len(self._in) >= WORD.size:
                    break  # first what was said before
                raise EOFError("the connection was closed")
            self._in += raw
        whole = len(self._in) // WORD.size * WORD.size
        words = [word for (word,) in WORD.iter_unpack(self._in[:whole])]
        del self._in[:whole]
        return words


def wait_for(sock: socket.socket, events: int, timeout_s: float | None = None) -> None:
    poll = select.poll()
    poll.register(sock, events)
    poll.poll(None if timeout_s is None else 1000 * timeout_s)


Said = TypeVar("Said", bound=msgspec.Struct)


def say(sock: socket.socket, message: msgspec.Struct, deadline: float) -> None:
    """Send one message, with its length before it. Raises LinkError at the deadline, OSError."""
    body = msgspec.msgpack.encode(message)
    _limit(sock, deadline)
    sock.sendall(LENGTH.pack(len(body)) + body)


def hear(sock: socket.socket, kind: type[Said], deadline: float, max_bytes: int = MAX_GREETING_BYTES) -> Said:
    """The next message. Raises LinkError at the deadline or when the other end hangs up, ProtocolError, OSError."""
    (length,) = LENGTH.unpack(_exactly(sock, LENGTH.size, deadline))
    if length > max_bytes:
        raise ProtocolError(f"a greeting of {length} bytes")
    try:
        return msgspec.msgpack.decode(_exactly(sock, length, deadline), type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolError(f"a greeting that does not decode: {error}") from None


def _limit(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise LinkError(f"no greeting within {GREETING_S:g} s")
    sock.settimeout(left)


def _exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    got = b""
    while len(got) < num_bytes:
        _limit(sock, deadline)
        piece = sock.recv(num_bytes - len(got))
        if not piece:
            raise LinkError("closed while greeting")
        got += piece
    return got


class Greeting:
    """The first exchange on a connection, within GREETING_S. Both ends prove that they hold the cluster secret, over
    fresh nonces of both, without sending it."""

    def __init__(self, sock: socket.socket, mine: Identity, address: str) -> None:
        self._sock, self._mine, self._address = sock, mine, address
        self._deadline = time.monotonic() + GREETING_S
        self._hello = Hello(MAGIC, VERSION, mine.name, os.urandom(NONCE_BYTES))

    def dial(self) -> Hello:
        """As the one who has dialled `address`; the other's hello. Raises LinkRefused, LinkError, OSError."""
        say(self._sock, self._hello, self._deadline)
        theirs = hear(self._sock, Hello, self._deadline)
        said = transcript(self._hello, theirs)
        say(self._sock, prove(self._mine, said), self._deadline)
        accept(self._mine, self._address, theirs, said, hear(self._sock, Verdict, self._deadline))
        self._sock.setblocking(False)
        return theirs

    def answer(self) -> Hello:
        """As the one who listens at `address`; the other's hello. Raises LinkRefused after having told why."""
        theirs = hear(self._sock, Hello, self._deadline)
        say(self._sock, self._hello, self._deadline)
        said = transcript(theirs, self._hello)
        verdict = judge(self._mine, self._address, theirs, said, hear(self._sock, Proof, self._deadline))
        say(self._sock, verdict, self._deadline)
        if verdict.refusal:
            raise LinkRefused(verdict.refusal)
        self._sock.setblocking(False)
        return theirs
