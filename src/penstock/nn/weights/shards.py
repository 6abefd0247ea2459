"""Safetensors files written tensor by tensor: the headers are planned first, so that nothing waits in memory.

Knows the file format and no tensor library: values come as bytes. Tensors of a shard lie in falling order of item size,
as readers that map files need them aligned. Nothing here is atomic; that is for who owns the directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from penstock.nn.weights.headers import DTYPE_BITS, INDEX_NAME, SINGLE_NAME

SHARD_BYTES = 4 << 30
Planned = tuple[str, str, tuple[int, ...]]  # name, dtype as safetensors spells it, shape


class ShardWriter:
    """Writes the tensors of `plan` into `directory`, in any order. A context manager; `finish` before leaving it."""

    def __init__(self, directory: Path, plan: Sequence[Planned], shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._places: dict[str, tuple[int, int, int]] = {}  # name -> (file, offset, bytes)
        self._names: dict[str, str] = {}
        self._files: list[int] = []
        self._missing = {name for name, _, _ in plan}
        shards: list[list[Planned]] = [[]]
        filled = 0
        for tensor in plan:
            size = _num_bytes(tensor)
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(tensor)
            filled += size
        for number, tensors in enumerate(shards, 1):
            single = len(shards) == 1
            self._start(SINGLE_NAME if single else f"model-{number:05}-of-{len(shards):05}.safetensors", tensors)

    def _start(self, file_name: str, tensors: list[Planned]) -> None:
        file = os.open(self._directory / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._files.append(file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in sorted(tensors, key=lambda planned: (-DTYPE_BITS[planned[1]], planned[0])):
            name, dtype, shape = tensor
            size = _num_bytes(tensor)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._places[name] = (file, offset, size)
            self._names[name] = file_name
            offset += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        os.write(file, len(raw).to_bytes(8, "little") + raw)
        for name, _, _ in tensors:
            file, offset, size = self._places[name]
            self._places[name] = (file, 8 + len(raw) + offset, size)

    def write(self, name: str, values: bytes | memoryview) -> None:
        """A planned tensor's bytes, little-endian, row-major. Once per name."""
        file, offset, size = self._places[name]
        raw = memoryview(values).cast("B")
        assert raw.nbytes == size, f"{name} has {raw.nbytes} bytes, planned were {size}"
        self._missing.remove(name)
        while raw.nbytes:
            count = os.pwrite(file, raw, offset)
            raw, offset = raw[count:], offset + count

    def finish(self) -> int:
        """Everything is written and on disk; the index, where there are several files. Returns the tensors' bytes."""
        assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
        total = sum(size for _, _, size in self._places.values())
        if len(self._files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._names.items()))}
            (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in self._files:
            os.fsync(file)
        return total

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        while self._files:
            os.close(self._files.pop())


def _num_bytes(tensor: Planned) -> int:
    _, dtype, shape = tensor
    return prod(shape) * DTYPE_BITS[dtype] // 8
