"""Host memory of a machine's pool: slots for stored blocks, mapped by the pool and by every engine that shares it.

Who may touch which slot when is the pool's business (`core/kv_pool.py`). A writer that wakes late can spoil a slot that
is somebody else's by then: every reader checks key and checksums, so that costs a miss.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penstock.config.model import KVLayout
from penstock.core.tiering import key_group
from penstock.tiers.record import Bytes, RecordFormat

PAGE_BYTES = 4096
_HEADER = struct.Struct("<8sI")  # magic, length of what follows: format and slots, as text
MAGIC = b"PENARENA"


class ArenaError(Exception):
    """The arena cannot be made, or is another layout's."""


class Arena:
    """`formats[g]` is the record format of KV group g; `num_slots[g]` its slots, numbered from 1.

    Made by one of `private`, `create`, `attach`. Records are views: they stay valid until `close`.
    """

    def __init__(self, layout: KVLayout, num_slots: Sequence[int], memory: mmap.mmap) -> None:
        self.formats = [RecordFormat.of(group) for group in layout.groups]
        self.num_slots = tuple(num_slots)
        self._memory = memory
        self._raw = np.frombuffer(memory, np.uint8)
        self._slots: list[Bytes] = []  # per group [num_slots, record bytes]
        start = PAGE_BYTES
        for format_, count in zip(self.formats, self.num_slots, strict=True):
            end = start + count * format_.num_bytes
            self._slots.append(self._raw[start:end].reshape(count, format_.num_bytes))
            start = end

    @classmethod
    def private(cls, layout: KVLayout, num_slots: Sequence[int]) -> Arena:
        """For one process that is pool and engine. Memory is taken at first touch, in huge pages where it can be."""
        memory = mmap.mmap(-1, arena_bytes(layout, num_slots), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return cls(layout, num_slots, memory)

    @classmethod
    def create(cls, path: Path, layout: KVLayout, num_slots: Sequence[int]) -> Arena:
        """A new file, of this user alone, best in /dev/shm; the memory is reserved, so that no later touch can fail.

        Unlink it when all engines have attached. Raises ArenaError where there is no room.
        """
        text = _describe(layout, num_slots)
        num_bytes = arena_bytes(layout, num_slots)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise ArenaError(f"cannot make the KV arena {path}: {error.strerror}") from None
        try:
            os.posix_fallocate(fd, 0, num_bytes)
            memory = mmap.mmap(fd, num_bytes)
        except OSError as error:
            path.unlink()
            raise ArenaError(f"no room for {num_bytes >> 20} MiB of KV arena in {path}: {error.strerror}") from None
        finally:
            os.close(fd)
        memory[: _HEADER.size + len(text)] = _HEADER.pack(MAGIC, len(text)) + text
        return cls(layout, num_slots, memory)

    @classmethod
    def attach(cls, path: Path, layout: KVLayout, num_slots: Sequence[int]) -> Arena:
        """The arena that a pool has created. Raises ArenaError if it is another layout's, naming both."""
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise ArenaError(f"cannot open the KV arena {path}: {error.strerror}") from None
        try:
            size = os.fstat(fd).st_size
            if size < PAGE_BYTES:
                raise ArenaError(f"{path} is no KV arena")
            memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        magic, length = _HEADER.unpack_from(memory, 0)
        found, wanted = bytes(memory[_HEADER.size : _HEADER.size + length]), _describe(layout, num_slots)
        if magic != MAGIC or found != wanted or size != arena_bytes(layout, num_slots):
            memory.close()
            raise ArenaError(f"the KV arena {path} is {found.decode(errors='replace')!r}, expected {wanted.decode()!r}")
        return cls(layout, num_slots, memory)

    def record(self, group: int, slot: int) -> Bytes:
        """[record bytes] of a slot; a view."""
        assert 0 < slot <= self.num_slots[group]
        record: Bytes = self._slots[group][slot - 1]
        return record

    def records(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[Bytes]:
        return [self.record(key_group(key), slot) for key, slot in zip(keys, slots, strict=True)]

    def close(self) -> None:
        """Give the memory back, unless somebody still has a view: then it goes with the last one."""
        self._slots.clear()
        del self._raw
        with contextlib.suppress(BufferError):
            self._memory.close()


def discard(path: Path) -> None:
    """Remove the arena of a pool that died, and give its memory back though engines may still have it mapped.

    What they read of it from now on is zeros, and so no block.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is none; not every system can do that
        fd = os.open(path, os.O_RDWR)
        try:
            with mmap.mmap(fd, os.fstat(fd).st_size) as memory:
                memory.madvise(mmap.MADV_REMOVE)
        finally:
            os.close(fd)
    path.unlink(missing_ok=True)


def arena_bytes(layout: KVLayout, num_slots: Sequence[int]) -> int:
    """What so many slots take."""
    sizes = (count * RecordFormat.of(group).num_bytes for group, count in zip(layout.groups, num_slots, strict=True))
    return PAGE_BYTES + sum(sizes)


def slots_for(layout: KVLayout, num_bytes: int) -> tuple[int, ...]:
    """Slots per KV group that fit in so much memory, equally many in each: a chain's block takes one of every group."""
    size = sum(RecordFormat.of(group).num_bytes for group in layout.groups)
    return (max(0, num_bytes - PAGE_BYTES) // size,) * len(layout.groups)


def _describe(layout: KVLayout, num_slots: Sequence[int]) -> bytes:
    text = f"{layout.format} x {','.join(map(str, num_slots))}".encode()
    if _HEADER.size + len(text) > PAGE_BYTES:
        raise ArenaError("the KV layout has too many groups to be described in one page")
    return text
