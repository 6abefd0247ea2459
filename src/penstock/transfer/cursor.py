"""A place in a list of buffers: what is left of them to read or fill. Knows bytes only."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

MAX_BUFFERS = 512  # in one window: IOV_MAX is 1024 on Linux and macOS
NUMPY_COPY_BYTES = 16 << 10  # from here on a copy is left to numpy, which lets other threads run meanwhile


class Cursor:
    """Goes through buffers as through one stream of `num_left` bytes."""

    def __init__(self, buffers: Iterable[memoryview]) -> None:
        self._buffers = [buffer for buffer in buffers if len(buffer)]
        self._index = 0
        self._offset = 0  # in the first buffer that is left
        self.num_left = sum(map(len, self._buffers))

    def window(self, max_bytes: int) -> list[memoryview]:
        """The next `max_bytes` bytes at most, as views, in at most MAX_BUFFERS pieces."""
        views: list[memoryview] = []
        offset = self._offset
        for index in range(self._index, min(self._index + MAX_BUFFERS, len(self._buffers))):
            if max_bytes <= 0:
                break
            view = self._buffers[index][offset : offset + max_bytes]
            views.append(view)
            max_bytes -= len(view)
            offset = 0
        return views

    def advance(self, num_bytes: int) -> None:
        self.num_left -= num_bytes
        self._offset += num_bytes
        while self._index < len(self._buffers) and self._offset >= len(self._buffers[self._index]):
            self._offset -= len(self._buffers[self._index])
            self._index += 1


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """`target[:] = source`, equally long; long ones without keeping other threads from running."""
    if len(source) < NUMPY_COPY_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def pour(targets: list[memoryview], sources: list[memoryview]) -> int:
    """Copy from the one list into the other until either ends; the bytes copied."""
    copied, n, skip = 0, 0, 0
    for target in targets:
        while len(target) and n < len(sources):
            source = sources[n][skip : skip + len(target)]
            copy_bytes(target[: len(source)], source)
            target = target[len(source) :]
            copied += len(source)
            skip += len(source)
            if skip == len(sources[n]):
                n, skip = n + 1, 0
    return copied
