"""One stored block: a header that says what it is, then its page (`KVGroup.extent`: all layers, one behind the other).

The same bytes lie in an arena slot, in a segment file and in a remote store, so a checksum made when the block left a
device is checked when it enters one, wherever it has been. Knows no file, no socket and no device.

Checksums are CRC-32, one per layer: whoever loads can use a layer as soon as it has been copied and checked, and every
burst of up to 32 wrong bits is found, any other damage but for 1 in 2^32. zlib's runs at 3.6 GB/s on the development
machine with the interpreter's lock released; blake2b at 0.8 GB/s would cost more than the copy.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.config.model import KVGroup

Bytes = NDArray[np.uint8]

MAGIC = b"PKV1"
MAX_KEY = 31
ALIGNMENT = 64
# Magic, number of layers, key with its length; CRCs of the layers, CRC of all that; parent, seconds, their CRC.
_HEAD = struct.Struct("<4sI32p")
_CRC = struct.Struct("<I")
_TAIL = struct.Struct("<32pd")


@dataclass(frozen=True, slots=True)
class Header:
    key: bytes
    sums: tuple[int, ...]  # CRC-32 per layer
    parent: bytes
    recompute_s: float


class RecordFormat:
    """Records of one KV group. `num_bytes` of each; `page_start` is where its layers begin."""

    def __init__(self, num_layers: int, layer_bytes: int) -> None:
        self.num_layers = num_layers
        self.layer_bytes = layer_bytes
        self._sums = struct.Struct(f"<{num_layers}I")
        self._sums_start = _HEAD.size
        self._crc_start = self._sums_start + self._sums.size
        self._tail_start = self._crc_start + _CRC.size
        end = self._tail_start + _TAIL.size + _CRC.size
        self.page_start = -(-end // ALIGNMENT) * ALIGNMENT
        self.num_bytes = -(-(self.page_start + num_layers * layer_bytes) // ALIGNMENT) * ALIGNMENT

    @classmethod
    def of(cls, group: KVGroup) -> RecordFormat:
        return cls(len(group.layers), group.layer_bytes)

    def page(self, record: Bytes, layer: int) -> Bytes:
        """[layer_bytes] of the `layer`-th layer of the group; a view."""
        start = self.page_start + layer * self.layer_bytes
        return record[start : start + self.layer_bytes]

    def seal(self, record: Bytes, key: bytes, sums: tuple[int, ...]) -> None:
        """Write the header: the page is whole, and these are its layers' checksums."""
        if len(key) > MAX_KEY:
            raise ValueError(f"a key has at most {MAX_KEY} bytes, got {len(key)}")
        view = record.data
        _HEAD.pack_into(view, 0, MAGIC, self.num_layers, key)
        self._sums.pack_into(view, self._sums_start, *sums)
        _CRC.pack_into(view, self._crc_start, zlib.crc32(view[: self._crc_start]))
        self.describe(record, b"", 0.0)

    def describe(self, record: Bytes, parent: bytes, recompute_s: float) -> None:
        """Add what a restarted pool wants to know. A reader of the page does not look at it."""
        view = record.data
        _TAIL.pack_into(view, self._tail_start, parent, recompute_s)
        end = self._tail_start + _TAIL.size
        _CRC.pack_into(view, end, zlib.crc32(view[self._tail_start : end]))

    def clear(self, record: Bytes) -> None:
        """No reader takes it for a block any more."""
        record[: len(MAGIC)] = 0

    def header(self, record: Bytes) -> Header | None:
        """None: this is no record of the format, or its header is damaged. Needs the first `page_start` bytes only.

        All of it is of one block, also while another one moves in: what is checked is a copy.
        """
        view = bytes(record[: self.page_start].data)
        magic, num_layers, key = _HEAD.unpack_from(view, 0)
        if magic != MAGIC or num_layers != self.num_layers:
            return None
        if _CRC.unpack_from(view, self._crc_start)[0] != zlib.crc32(view[: self._crc_start]):
            return None
        parent, recompute_s = _TAIL.unpack_from(view, self._tail_start)
        end = self._tail_start + _TAIL.size
        if _CRC.unpack_from(view, end)[0] != zlib.crc32(view[self._tail_start : end]):
            parent, recompute_s = b"", 0.0
        return Header(key, self._sums.unpack_from(view, self._sums_start), parent, recompute_s)

    def is_whole(self, record: Bytes, key: bytes) -> bool:
        """Is it the block `key`, unharmed in every layer?"""
        header = self.header(record)
        return (
            header is not None
            and header.key == key
            and all(zlib.crc32(self.page(record, n).data) == header.sums[n] for n in range(self.num_layers))
        )
