"""A directory of segment files that keeps KV blocks across restarts.

A segment holds records (`record.py`) of one KV group in places of one size; a freed place is used again, an empty
segment is given back to the file system. There is no manifest to go stale: each record's header says what it is, and a
start reads all headers. A block is written page first, header last, and a freed place loses its header first; so a
process killed at any moment leaves whole blocks and free places. There is no fsync: after a power failure the kernel
may have kept a header and lost its page, and the checksums tell. Knows files and records; not who wants a block or
which should go.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock.config.model import KVLayout
from penstock.core.tiering import key_group
from penstock.tiers.record import RecordFormat

VERSION = 1
HEADER_BYTES = 4096
SEGMENT_BYTES = 64 << 20
MAX_SEGMENTS = 256  # open files
_HEADER = struct.Struct("<8sIIQI")  # magic, version, KV group, record bytes, length of the format that follows
_CRC = struct.Struct("<I")
MAGIC = b"PENKVSEG"
_NAME = re.compile(r"kv-(\d+)-(\d+)\.segment")


class StoreRefused(Exception):
    """The directory cannot be used: not writable, in use, too small, or of another format."""


@dataclass(slots=True, eq=False)
class _Segment:
    group: int
    number: int
    path: Path
    fd: int
    keys: dict[int, bytes] = field(default_factory=dict)  # place -> key


@dataclass(frozen=True, slots=True)
class FileCalls:
    """The system calls that move bytes, so that tests can have them fail."""

    write: Callable[[int, memoryview, int], int] = os.pwrite
    read: Callable[[int, Sequence[memoryview], int], int] = os.preadv


class DiskStore:
    """A `Store` (core/doors.py). `max_bytes` bounds the files' sizes. One process at a time may have a directory.

    `num_blocks[g]` places for KV group g. `error`: what kept the last call from reading or writing files, None if
    nothing did; a missing or damaged block is no error. Opening raises StoreRefused; later calls raise nothing.
    """

    def __init__(
        self,
        directory: Path,
        layout: KVLayout,
        max_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        calls: FileCalls | None = None,
    ) -> None:
        self.directory = directory
        self.format = layout.format
        self.formats = [RecordFormat.of(group) for group in layout.groups]
        self.calls = calls or FileCalls()
        self.error: str | None = None
        self.num_bad = 0
        self._places: dict[bytes, tuple[_Segment, int]] = {}
        self._segments: dict[tuple[int, int], _Segment] = {}
        self._free: list[list[tuple[int, int]]] = [[] for _ in self.formats]  # heaps of (segment, place)
        self._shape(max_bytes, max(segment_bytes, max_bytes // MAX_SEGMENTS))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreRefused(f"KV tier directory {directory}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover()
        except BlockingIOError:
            os.close(self._lock)
            raise StoreRefused(f"KV tier directory {directory} is in use by another pool") from None
        except OSError as error:
            self.close()
            raise StoreRefused(f"KV tier directory {directory}: {error}") from None
        except StoreRefused:
            self.close()
            raise

    def _shape(self, max_bytes: int, segment_bytes: int) -> None:
        """Places per segment and segments per group: equally many blocks of every group."""
        per_block = sum(format_.num_bytes for format_ in self.formats)
        num_places, num_segments = [], []
        for format_ in self.formats:
            share = max_bytes * format_.num_bytes // per_block
            size = min(segment_bytes, share)
            num_places.append(max(0, size - HEADER_BYTES) // format_.num_bytes)
            if not num_places[-1]:
                raise StoreRefused(f"{max_bytes} bytes hold no block of {format_.num_bytes} bytes in every KV group")
            num_segments.append(share // (HEADER_BYTES + num_places[-1] * format_.num_bytes))
        self._num_places, self._num_segments = num_places, num_segments

    @property
    def num_blocks(self) -> tuple[int, ...]:
        return tuple(n * m for n, m in zip(self._num_places, self._num_segments, strict=True))

    def __len__(self) -> int:
        return len(self._places)

    # ---- opening ----

    def _recover(self) -> None:
        """Read all headers. Unfinished segments and those beyond the bound go; another format's are refused."""
        for path in sorted(self.directory.iterdir()):
            name = _NAME.fullmatch(path.name)
            if name is None:
                continue
            group, number = int(name[1]), int(name[2])
            fd = os.open(path, os.O_RDWR)
            segment = _Segment(group, number, path, fd)
            self._segments[group, number] = segment
            if not self._is_ours(segment):
                self._unlink(segment)
                continue
            self._read_headers(segment)
        for group, most in enumerate(self._num_segments):
            segments = [segment for segment in self._segments.values() if segment.group == group]
            segments.sort(key=lambda segment: len(segment.keys))
            for segment in segments[: max(0, len(segments) - most)]:
                for key in segment.keys.values():
                    del self._places[key]
                self._unlink(segment)
        for segment in self._segments.values():
            self._offer_places(segment)

    def _is_ours(self, segment: _Segment) -> bool:
        """False: it was being made when its maker died. Raises StoreRefused if it is another format's."""
        head = os.pread(segment.fd, HEADER_BYTES, 0)
        if len(head) < HEADER_BYTES or _CRC.unpack_from(head, HEADER_BYTES - 4)[0] != zlib.crc32(head[:-4]):
            return False
        magic, version, group, record_bytes, length = _HEADER.unpack_from(head, 0)
        found = head[_HEADER.size : _HEADER.size + length].decode(errors="replace")
        if magic != MAGIC or version != VERSION or found != self.format:
            raise StoreRefused(
                f"KV tier directory {self.directory} holds blocks of format {found!r} (version {version}), this model's"
                f" are {self.format!r} (version {VERSION}): give it another directory, or delete the .segment files"
            )
        return bool(group == segment.group and record_bytes == self.formats[group].num_bytes)

    def _read_headers(self, segment: _Segment) -> None:
        format_ = self.formats[segment.group]
        size = os.fstat(segment.fd).st_size
        buffer = np.zeros(format_.page_start, np.uint8)
        for place in range((size - HEADER_BYTES) // format_.num_bytes):
            if os.preadv(segment.fd, [buffer.data], self._offset(segment, place)) < format_.page_start:
                break
            header = format_.header(buffer)
            if header is None or not header.key or key_group(header.key) != segment.group:
                continue
            if header.key in self._places:
                self._clear(segment, place)
            else:
                segment.keys[place] = header.key
                self._places[header.key] = segment, place

    def recovered(self) -> Iterator[tuple[bytes, bytes, float]]:
        """(key, parent, seconds to recompute) of what is there: for the pool, before anything is written."""
        for group, format_ in enumerate(self.formats):
            buffer = np.zeros(format_.page_start, np.uint8)
            for segment in [segment for segment in self._segments.values() if segment.group == group]:
                for place, key in list(segment.keys.items()):
                    os.preadv(segment.fd, [buffer.data], self._offset(segment, place))
                    header = format_.header(buffer)
                    if header is not None:
                        yield key, header.parent, header.recompute_s

    # ---- the store ----

    def read(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """Fill the buffers, each of its record's size, of blocks that are there, whole and unharmed."""
        self.error = None
        found = []
        for key, buffer in zip(keys, into, strict=True):
            place = self._places.get(key)
            try:
                ok = place is not None and self._read(key, *place, buffer)
            except OSError as error:
                self.error, ok = f"cannot read {self.directory}: {error.strerror}", False
            else:
                if place is not None and not ok:
                    self.num_bad += 1
                    self._delete([key])
            found.append(ok)
        return found

    def _read(self, key: bytes, segment: _Segment, place: int, buffer: memoryview) -> bool:
        num_bytes = self.calls.read(segment.fd, [buffer], self._offset(segment, place))
        return num_bytes == len(buffer) and self.formats[segment.group].is_whole(np.frombuffer(buffer, np.uint8), key)

    def write(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """Which were stored. What is not the whole block `key` is not."""
        error: str | None = None
        stored = []
        for key, block in zip(keys, blocks, strict=True):
            if key in self._places:
                stored.append(True)
            elif error is not None:  # with an earlier block: the others are not tried
                stored.append(False)
            else:
                try:
                    stored.append(self._write(key, block))
                except OSError as problem:
                    error = f"cannot write {self.directory}: {problem.strerror}"
                    stored.append(False)
        self.error = error
        return stored

    def _write(self, key: bytes, block: memoryview) -> bool:
        """False: it is not whole, or the bound is reached. Raises OSError."""
        group = key_group(key)
        format_ = self.formats[group]
        if not format_.is_whole(np.frombuffer(block, np.uint8), key):
            return False
        taken = self._take_place(group)
        if taken is None:
            return False
        segment, place = taken
        offset, start = self._offset(segment, place), format_.page_start
        try:
            self._write_all(segment.fd, block[start:], offset + start)
            self._write_all(segment.fd, block[:start], offset)
        except OSError:
            self._free_place(segment, place)
            raise
        segment.keys[place] = key
        self._places[key] = segment, place
        return True

    def delete(self, keys: Sequence[bytes]) -> None:
        """Their places are free."""
        self.error = None
        self._delete(keys)

    def _delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            found = self._places.pop(key, None)
            if found is not None:
                segment, place = found
                del segment.keys[place]
                self._free_place(segment, place)

    def find(self, keys: Sequence[bytes]) -> list[bool]:
        self.error = None
        return [key in self._places for key in keys]

    def close(self) -> None:
        """The directory is free for another pool."""
        for segment in self._segments.values():
            os.close(segment.fd)
        self._segments.clear()
        self._places.clear()
        os.close(self._lock)

    # ---- places ----

    def _offset(self, segment: _Segment, place: int) -> int:
        return HEADER_BYTES + place * self.formats[segment.group].num_bytes

    def _write_all(self, fd: int, data: memoryview, offset: int) -> None:
        while data:
            num_bytes = self.calls.write(fd, data, offset)
            data, offset = data[num_bytes:], offset + num_bytes

    def _clear(self, segment: _Segment, place: int) -> None:
        """No start takes the place for a block. If that cannot be written, the checksums will tell."""
        with contextlib.suppress(OSError):
            self.calls.write(segment.fd, memoryview(bytes(8)), self._offset(segment, place))

    def _take_place(self, group: int) -> tuple[_Segment, int] | None:
        """A free one in the first segment that has one; None when the bound is reached. Raises OSError."""
        free = self._free[group]
        while True:
            while free:
                number, place = heapq.heappop(free)
                segment = self._segments.get((group, number))
                if segment is not None and place not in segment.keys:
                    return segment, place
            number = next((n for n in range(self._num_segments[group]) if (group, n) not in self._segments), -1)
            if number < 0 or not self._has_room_for_another(group):
                return None
            self._offer_places(self._new_segment(group, number))

    def _has_room_for_another(self, group: int) -> bool:
        return sum(1 for g, _ in self._segments if g == group) < self._num_segments[group]

    def _new_segment(self, group: int, number: int) -> _Segment:
        path = self.directory / f"kv-{group}-{number}.segment"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        segment = _Segment(group, number, path, fd)
        text = self.format.encode()
        head = _HEADER.pack(MAGIC, VERSION, group, self.formats[group].num_bytes, len(text)) + text
        head = head.ljust(HEADER_BYTES - 4, b"\0")
        self._segments[group, number] = segment
        try:
            self._write_all(fd, memoryview(head + _CRC.pack(zlib.crc32(head))), 0)
        except OSError:
            self._unlink(segment)
            raise
        return segment

    def _offer_places(self, segment: _Segment) -> None:
        for place in range(self._num_places[segment.group]):
            if place not in segment.keys:
                heapq.heappush(self._free[segment.group], (segment.number, place))

    def _free_place(self, segment: _Segment, place: int) -> None:
        self._clear(segment, place)
        free = self._free[segment.group]
        if not segment.keys and any(number != segment.number for number, _ in free):
            self._unlink(segment)  # its places in the heap are passed over
            self._free[segment.group] = [entry for entry in free if entry[0] != segment.number]
            heapq.heapify(self._free[segment.group])
        else:
            heapq.heappush(free, (segment.number, place))

    def _unlink(self, segment: _Segment) -> None:
        del self._segments[segment.group, segment.number]
        os.close(segment.fd)
        with contextlib.suppress(OSError):
            segment.path.unlink()
