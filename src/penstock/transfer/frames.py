"""What two ends of a link say to each other, as bytes, and who may speak at all. Knows no socket and no pool.

After the greeting a sender writes frames: length of the header (4 bytes), header (msgpack), payload, one closing byte
that says whether the payload is true or was given up half-way. The receiver answers 8-byte words only. Every length is
bounded before anything is allocated, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

VERSION = 1
MAGIC = "penstock-link"
NONCE_BYTES = 32
MAX_GREETING_BYTES = 16 << 10
MAX_RUNS = 16 << 10  # in one frame
MAX_HEADER_BYTES = MAX_RUNS * 12 + 1024
MAX_FRAME_BYTES = 16 << 20  # of payload; one unit may be larger than that, and then goes alone
MAX_PING_BYTES = 16 << 20
WHOLE, ABANDONED = b"\x01", b"\x00"
LENGTH = struct.Struct("<I")

Name = Annotated[str, Meta(max_length=256)]
Number = Annotated[int, Meta(ge=0, le=(1 << 62) - 1)]
Mac = Annotated[bytes, Meta(min_length=32, max_length=32)]


class LinkError(Exception):
    """A link cannot be made, or is broken."""


class LinkRefused(LinkError):
    """One end will not speak with the other; the text names both."""


class ProtocolError(LinkError):
    """The other end says what no end of this version says."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who speaks: its name among peers, its `KVLayout.format`, and the secret that all of the cluster hold."""

    name: str
    format: str
    secret: bytes


class Hello(msgspec.Struct, array_like=True, frozen=True):
    """First words of both ends. Says nothing that a stranger should not know."""

    magic: Name
    version: Number
    name: Name
    nonce: Mac


class Proof(msgspec.Struct, array_like=True, frozen=True):
    """Of the one who dialled: it holds the secret, and this is its format."""

    format: Annotated[str, Meta(max_length=4096)]
    mac: Mac


class Verdict(msgspec.Struct, array_like=True, frozen=True):
    """Of the one who was dialled: its own proof, or why not. `mac` is of the refusal's text too."""

    refusal: Annotated[str, Meta(max_length=8192)]
    mac: Mac


class Data(msgspec.Struct, array_like=True, frozen=True, tag="data"):
    """A frame of units. Payload: for each run (layer, first block id at the receiver, count), its units in order.

    (move, part) number the frames of one sender: one that comes twice counts once.
    """

    transfer_id: Name
    epoch: Number
    move: Number
    part: Number
    runs: Annotated[bytes, Meta(max_length=MAX_RUNS * 12)]  # int32 [runs, 3], little endian


class Ping(msgspec.Struct, array_like=True, frozen=True, tag="ping"):
    """Payload of no meaning; the receiver answers `id` when it has all of it."""

    id: Annotated[int, Meta(ge=0, lt=1 << 32)]
    num_bytes: Annotated[int, Meta(ge=0, le=MAX_PING_BYTES)]


_encode = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(Data | Ping).decode


def header_bytes(header: Data | Ping) -> bytes:
    """Length and header, as they go out before the payload."""
    body = _encode(header)
    assert len(body) <= MAX_HEADER_BYTES
    return LENGTH.pack(len(body)) + body


def parse_length(raw: bytes | bytearray) -> int:
    (length,) = LENGTH.unpack(raw)
    if not 1 <= length <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {length} bytes")
    return int(length)


def parse_header(raw: bytes | bytearray) -> Data | Ping:
    try:
        header: Data | Ping = _decode_header(raw)
        return header
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a header that does not decode: {error}") from None


def pack_runs(runs: Sequence[tuple[int, int, int]]) -> bytes:
    return np.asarray(runs, "<i4").reshape(-1, 3).tobytes()


def parse_runs(raw: bytes, layer_bytes: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """(int64 [runs, 3]: layer, first block, count; payload bytes). Raises ProtocolError for what no sender sends."""
    if not raw or len(raw) % 12:
        raise ProtocolError(f"{len(raw)} bytes of runs")
    runs = np.frombuffer(raw, "<i4").reshape(-1, 3).astype(np.int64)
    layers, first, counts = runs.T
    if layers.min() < 0 or layers.max() >= len(layer_bytes) or first.min() < 0:
        raise ProtocolError("runs outside any pool")
    if counts.min() < 1 or counts.max() > MAX_FRAME_BYTES:  # beyond, the sum below might pass 2^63
        raise ProtocolError("runs of no blocks, or of more than a frame holds")
    num_bytes = int((np.asarray(layer_bytes, np.int64)[layers] * counts).sum())
    if num_bytes > MAX_FRAME_BYTES and counts.sum() > 1:
        raise ProtocolError(f"a frame of {num_bytes} bytes")
    return runs, num_bytes


def transcript(dialler: Hello, listener: Hello) -> bytes:
    """What both proofs are about: everything said so far."""
    first, second = _encode(dialler), _encode(listener)
    return hashlib.sha256(LENGTH.pack(len(first)) + first + second).digest()


def prove(dialler: Identity, said: bytes) -> Proof:
    return Proof(dialler.format, _mac(dialler.secret, b"dialler", said, dialler.format))


def judge(listener: Identity, address: str, dialler: Hello, said: bytes, proof: Proof) -> Verdict:
    """The dialled end's answer to a proof; `refusal` "" lets the other in. The order of checks keeps what this end is
    from those who hold no secret."""
    refusal = ""
    if dialler.magic != MAGIC or dialler.version != VERSION:
        refusal = f"it speaks link protocol {dialler.version}, this end {VERSION}"
    elif not hmac.compare_digest(proof.mac, _mac(listener.secret, b"dialler", said, proof.format)):
        refusal = "it does not hold this cluster's secret"
    elif proof.format != listener.format:
        refusal = f"its KV format is {proof.format}, not {listener.format}"
    if refusal:
        refusal = f"{listener.name} at {address} refuses {dialler.name}: {refusal}"
    return Verdict(refusal, _mac(listener.secret, b"listener", said, refusal))


def accept(dialler: Identity, address: str, listener: Hello, said: bytes, verdict: Verdict) -> None:
    """The dialling end's look at the answer. Raises LinkRefused."""
    if verdict.refusal:
        raise LinkRefused(verdict.refusal)
    if listener.magic != MAGIC or listener.version != VERSION:
        raise LinkRefused(
            f"{dialler.name} refuses {listener.name} at {address}: it speaks link protocol {listener.version}, "
            f"this end {VERSION}"
        )
    if not hmac.compare_digest(verdict.mac, _mac(dialler.secret, b"listener", said, "")):
        raise LinkRefused(
            f"{dialler.name} refuses {listener.name} at {address}: it does not hold this cluster's secret"
        )


def _mac(secret: bytes, role: bytes, said: bytes, text: str) -> bytes:
    return hmac.new(secret, role + b"\0" + said + text.encode(), hashlib.sha256).digest()
