"""What two machines' pools say to each other, and the connection that carries it: small messages, and blocks as they
are stored.

The one who dials asks, the other answers, one thing at a time. A message is its length (4 bytes) and msgpack; the
records that it announces follow it, each of its KV group's size. Every length is bounded before anything is allocated,
nothing is ever unpickled, and nothing waits without end. Knows sockets; not who holds which block.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from penstock.config.model import KVLayout
from penstock.core.tiering import key_group
from penstock.tiers.record import MAX_KEY, RecordFormat
from penstock.transfer.frames import Identity, ProtocolError

VERSION = 1
MAX_FIND = 4096  # keys of one question
MAX_RECORDS = 1024  # of one message
MAX_BYTES = 32 << 20  # of the records of one message, or one record: so much is pinned for a peer at a time
LEAST_BYTES_S = 20e6  # a peer that carries less is given up
_MAX_MESSAGE_BYTES = 256 << 10
_LENGTH = struct.Struct("<I")

Key = Annotated[bytes, Meta(min_length=2, max_length=MAX_KEY)]
Keys = Annotated[tuple[Key, ...], Meta(max_length=MAX_RECORDS)]
Flags = Annotated[tuple[bool, ...], Meta(max_length=MAX_FIND)]


class Find(msgspec.Struct, array_like=True, frozen=True, tag="find"):
    """Which of these are there? Answered by Flags."""

    keys: Annotated[tuple[Key, ...], Meta(max_length=MAX_FIND)]


class Get(msgspec.Struct, array_like=True, frozen=True, tag="get"):
    """These blocks. Answered by Flags, behind which come the records of those that are there."""

    keys: Keys


class Put(msgspec.Struct, array_like=True, frozen=True, tag="put"):
    """Take these. `parents`, `costs_s` as in core/tiering.py. Answered by Flags: which are wanted; their records are
    sent, and answered by Flags: which were whole, and were kept."""

    keys: Keys
    parents: Annotated[tuple[Annotated[bytes, Meta(max_length=MAX_KEY)], ...], Meta(max_length=MAX_RECORDS)]
    costs_s: Annotated[tuple[float, ...], Meta(max_length=MAX_RECORDS)]


Asked = Find | Get | Put
_encode = msgspec.msgpack.Encoder().encode
_ASKED: msgspec.msgpack.Decoder[Asked] = msgspec.msgpack.Decoder(Asked)
_FLAGS: msgspec.msgpack.Decoder[tuple[bool, ...]] = msgspec.msgpack.Decoder(Flags)
Said = TypeVar("Said")


def pool_identity(name: str, layout: KVLayout, secret: str) -> Identity:
    """Who a pool is to its peers: one of another version, layout or secret is refused by the greeting, which names
    both."""
    return Identity(name, f"pool {VERSION} of {layout.format}", secret.encode())


def check_keys(asked: Asked, formats: list[RecordFormat]) -> None:
    """Raises ProtocolError for keys of no KV group, and for more than one message may ask for."""
    if any(key_group(key) >= len(formats) for key in asked.keys):
        raise ProtocolError("a key of no KV group")
    if not isinstance(asked, Find):
        sizes = [formats[key_group(key)].num_bytes for key in asked.keys]
        if len(sizes) > 1 and sum(sizes) > MAX_BYTES:
            raise ProtocolError(f"{sum(sizes)} bytes of blocks in one message")
    if isinstance(asked, Put) and not len(asked.keys) == len(asked.parents) == len(asked.costs_s):
        raise ProtocolError("a parent and a cost belong to each block")


class RecordLine:
    """One end of a greeted connection. Methods wait until `deadline_s` of time.monotonic at most.

    They raise OSError (TimeoutError too), EOFError or LinkError when the connection is of no more use.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def say(self, message: Asked | tuple[bool, ...], deadline_s: float) -> None:
        body = _encode(message)
        self.send([memoryview(_LENGTH.pack(len(body)) + body)], deadline_s)

    def send(self, views: list[memoryview], deadline_s: float) -> None:
        """All bytes of the views, in order."""
        left = [view for view in views if len(view)]
        while left:
            self._limit(deadline_s)
            sent = self.sock.sendmsg(left[:64])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def asked(self) -> Asked:
        """The next question, whenever it comes; once it has begun, within a second."""
        self.sock.settimeout(None)
        first = self.sock.recv(1)
        if not first:
            raise EOFError("the connection was closed")
        return self._message(first, _ASKED, time.monotonic() + 1.0)

    def flags(self, number: int, deadline_s: float) -> tuple[bool, ...]:
        """The answer to a question about so many blocks."""
        found = self._message(b"", _FLAGS, deadline_s)
        if len(found) != number:
            raise ProtocolError(f"an answer about {len(found)} blocks to a question about {number}")
        return found

    def receive(self, view: memoryview, deadline_s: float) -> None:
        """Fill the view."""
        while len(view):
            self._limit(deadline_s)
            got = self.sock.recv_into(view)
            if not got:
                raise EOFError("the connection was closed")
            view = view[got:]

    def close(self) -> None:
        self.sock.close()

    def _message(self, begun: bytes, decoder: msgspec.msgpack.Decoder[Said], deadline_s: float) -> Said:
        head = bytearray(begun.ljust(_LENGTH.size, b"\0"))
        self.receive(memoryview(head)[len(begun) :], deadline_s)
        (length,) = _LENGTH.unpack(head)
        if not 1 <= length <= _MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of {length} bytes")
        body = bytearray(length)
        self.receive(memoryview(body), deadline_s)
        try:
            return decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"a message that does not decode: {error}") from None

    def _limit(self, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.sock.settimeout(left_s)


def why(error: Exception) -> str:
    """What to tell people."""
    if isinstance(error, TimeoutError):
        return "it takes too long"
    return str(error) or type(error).__name__
