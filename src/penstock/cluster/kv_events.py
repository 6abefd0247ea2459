"""vLLM's format of KV cache events, both ways: so that its routers understand us, and we understand its engines.

A PUB message has three frames: topic, sequence number (8 bytes, big-endian), payload. The payload is msgpack:
`[ts, [events], data_parallel_rank]`, where an event is a map with "type" or, from vLLM before 0.9.2 and from SGLang, an
array that begins with its type. Missed messages come from a ROUTER socket: (client, empty, first wanted number) is
answered with (client, empty, topic, number, payload) each, and number -1 at the end. Knows bytes; opens no socket.
Source: vllm/distributed/kv_events.py, vLLM 0.15.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.core.kv_events import KVChange, KVEvents, StoredTokens
from penstock.core.moves import DEVICE

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
# Their names of where a block lies, and ours. None is what engines say that have one place only.
MEDIUMS = {DEVICE: "GPU", "host": "CPU", "disk": "STORAGE", "remote": "STORAGE"}
_TIERS = {"GPU": DEVICE, None: DEVICE, "CPU": "host", "CPU_PINNED": "host", "STORAGE": "disk", "DISK": "disk"}

BlockHash = bytes | int


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, frozen=True):
    """Blocks of one chain that can be hit. `token_ids` are theirs together, in order."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, frozen=True):
    """Blocks that no longer can."""

    block_hashes: list[BlockHash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, frozen=True):
    """Nothing can be hit any more, in any medium."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    """One payload. Events that are not known are passed over."""

    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class FormatError(ValueError):
    """What came is not a batch of KV events."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(EventBatch)
_KNOWN: dict[str, type[BlockStored | BlockRemoved | AllBlocksCleared]] = {
    kind.__name__: kind for kind in (BlockStored, BlockRemoved, AllBlocksCleared)
}
_FIELDS = {name: tuple(field.name for field in msgspec.structs.fields(kind)) for name, kind in _KNOWN.items()}
# As arrays, stored blocks have had no more than these.
_FIELDS["BlockStored"] = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
)
_ABSENT = {"lora_id": None, "medium": None, "lora_name": None}  # older engines leave them out


def encode(events: KVEvents, time_s: float, topic: str = "", data_parallel_rank: int | None = None) -> list[bytes]:
    """The three frames. `time_s` is the wall clock's. Routers with hashes of their own need changes with tokens."""
    batch = EventBatch(time_s, [_told(change) for change in events.changes], data_parallel_rank)
    return [topic.encode(), events.seq.to_bytes(8, "big"), _encoder.encode(batch)]


def _told(change: KVChange) -> BlockStored | BlockRemoved | AllBlocksCleared:
    medium = MEDIUMS[change.tier]
    if not change.stored:
        return BlockRemoved(list(change.hashes), medium) if change.hashes else AllBlocksCleared()
    tokens = change.tokens or StoredTokens(None, (), 0)
    return BlockStored(
        list(change.hashes), tokens.parent, list(tokens.token_ids), tokens.block_size, None, medium, None
    )


def decode(frames: Sequence[bytes], engine: str, life: int = 0) -> KVEvents:
    """What an engine said. It gives no checksum. Events of KV groups but the first are left out. Raises FormatError."""
    if len(frames) != 3 or len(frames[1]) != 8:
        raise FormatError(f"{engine}: {len(frames)} frames where topic, 8 bytes of number and payload should be")
    try:
        batch = _decoder.decode(frames[2])
        told = [_event(raw) for raw in batch.events]
    except (msgspec.MsgspecError, TypeError, IndexError) as error:
        raise FormatError(f"{engine}: not a batch of KV events: {error}") from error
    changes: list[KVChange] = []
    for event in told:
        if isinstance(event, AllBlocksCleared):
            changes += [KVChange(False, tier, ()) for tier in (DEVICE, "host", "disk")]
        elif event is not None and not event.group_idx:
            changes += _changes(event)
    return KVEvents(engine, life, int.from_bytes(frames[1], "big"), tuple(changes))


def _event(raw: Any) -> BlockStored | BlockRemoved | AllBlocksCleared | None:
    if isinstance(raw, list):
        fields = dict(zip(("type", *_FIELDS.get(raw[0], ())), raw, strict=False))
    else:
        fields = dict(raw)
    kind = _KNOWN.get(fields.pop("type", ""))
    return None if kind is None else msgspec.convert({**_ABSENT, **fields}, kind)


def _changes(event: BlockStored | BlockRemoved) -> list[KVChange]:
    hashes = tuple(sixteen(hash_) for hash_ in event.block_hashes)
    tier = _TIERS.get(event.medium)
    if not hashes or tier is None:
        return []
    if isinstance(event, BlockRemoved):
        return [KVChange(False, tier, hashes)]
    tokens = None
    if event.token_ids:
        parent = event.parent_block_hash
        tokens = StoredTokens(None if parent is None else sixteen(parent), tuple(event.token_ids), event.block_size)
    return [KVChange(True, tier, hashes, tokens)]


def sixteen(hash_: BlockHash) -> bytes:
    """A hash of theirs in our 16 bytes: the first of a longer one, a number of 64 bits filled up with zeros."""
    if isinstance(hash_, int):
        return (hash_ & (2**64 - 1)).to_bytes(8, "little") + bytes(8)
    return hash_[:16].ljust(16, b"\0")


def replay(kept: Sequence[tuple[int, bytes]], request: Sequence[bytes], topic: str = "") -> list[list[bytes]]:
    """What the ROUTER socket answers: batches (number, payload) from the wanted one on, the end. Raises FormatError."""
    if len(request) != 3 or len(request[2]) != 8:
        raise FormatError(f"{len(request)} frames where client, nothing and 8 bytes of number should be")
    client, first = request[0], int.from_bytes(request[2], "big")
    answers = [[client, b"", topic.encode(), seq.to_bytes(8, "big"), payload] for seq, payload in kept if seq >= first]
    return [*answers, [client, b"", b"", END_OF_REPLAY, b""]]
