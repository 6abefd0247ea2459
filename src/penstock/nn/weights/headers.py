"""Safetensors headers and `model.safetensors.index.json`: which tensor lies where, checked before any weight is read.

Knows file formats only: no torch, no model, no parameter. Format: github.com/huggingface/safetensors, "Format": 8 bytes
little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the tensors without gaps.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from penstock.nn.weights.errors import (
    CheckpointError,
    DuplicateTensor,
    IndexDisagrees,
    MalformedFile,
    MissingShard,
    NoCheckpoint,
    TrailingBytes,
    TruncatedShard,
)

MAX_HEADER_BYTES = 100_000_000  # the same limit as the safetensors library
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a shard: bytes [start, end) of the file, row-major. `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file whose header agrees with its size. `tensors` in file order, without gap or overlap."""

    path: Path
    num_bytes: int
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All shards of a directory, in file-name order; no tensor name occurs twice."""

    directory: Path
    shards: tuple[Shard, ...]


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Read every header of a Hugging Face model directory. Reads no weight.

    `model.safetensors` alone, else the files of the index, else all numbered shards, else the only file there is (the
    order of transformers). Raises a CheckpointError when files, headers and index do not agree in every point.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NoCheckpoint(f"{directory}: no such directory")
    if (directory / SINGLE_NAME).exists():
        return _collect(directory, [SINGLE_NAME])
    if (directory / INDEX_NAME).exists():
        weight_map = _read_index(directory / INDEX_NAME)
        checkpoint = _collect(directory, sorted(set(weight_map.values())))
        _compare(checkpoint, weight_map)
        return checkpoint
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    if numbered:
        count = int(numbered[0][2])
        return _collect(directory, [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)])
    if len(names) == 1:
        return _collect(directory, names)
    if names:
        raise NoCheckpoint(f"{directory}: {len(names)} safetensors files but neither {SINGLE_NAME} nor {INDEX_NAME}")
    hint = "; it holds PyTorch .bin files: convert them to safetensors" if any(directory.glob("*.bin")) else ""
    raise NoCheckpoint(f"{directory}: no safetensors file{hint}")


def read_header(path: Path) -> Shard:
    """Parse and check one file's header. Raises MalformedFile, TruncatedShard or TrailingBytes."""
    try:
        num_bytes, raw = _read_header_bytes(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    data_start = len(raw) + 8
    header = _parse_json(path, raw)
    tensors = [_parse_tensor(path, name, entry, data_start) for name, entry in header if name != "__metadata__"]
    names = set()
    for tensor in tensors:
        if tensor.name in names:
            raise DuplicateTensor(f"{path}: {tensor.name} occurs twice in the header")
        names.add(tensor.name)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a gap before it"
            raise MalformedFile(f"{path}: {tensor.name} {kind} (offset {tensor.start}, expected {position})")
        position = tensor.end
    if num_bytes < position:
        raise TruncatedShard(f"{path}: truncated: {num_bytes} bytes, the header promises {position}")
    if num_bytes > position:
        raise TrailingBytes(f"{path}: {num_bytes - position} bytes after the last tensor (size {num_bytes})")
    return Shard(path, num_bytes, tuple(tensors))


def _read_header_bytes(path: Path) -> tuple[int, bytes]:
    """(size of the file, its JSON header)."""
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes < 8:
            raise TruncatedShard(f"{path}: {num_bytes} bytes, too short for a safetensors header")
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise MalformedFile(f"{path}: header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}")
        if header_bytes > num_bytes - 8:
            raise TruncatedShard(f"{path}: the header needs {header_bytes + 8} bytes, the file has {num_bytes}")
        return num_bytes, file.read(header_bytes)


def _collect(directory: Path, names: Iterable[str]) -> Checkpoint:
    names = list(names)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MissingShard(f"{directory}: missing shard {', '.join(missing[:3])}{more}")
    shards = tuple(read_header(directory / name) for name in names)
    homes: dict[str, Path] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in homes:
                raise DuplicateTensor(f"{tensor.name} is stored in both {homes[tensor.name]} and {shard.path}")
            homes[tensor.name] = shard.path
    return Checkpoint(directory, shards)


def _read_index(path: Path) -> dict[str, str]:
    pairs = dict(_parse_json(path, path.read_bytes()))
    weight_map = pairs.get("weight_map")
    if not isinstance(weight_map, _Members) or not weight_map:
        raise MalformedFile(f"{path}: weight_map must be an object that names at least one tensor")
    found: dict[str, str] = {}
    for name, shard in weight_map:
        # Only plain names: an index must not lead the loader out of the model's directory.
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise MalformedFile(f"{path}: {name} is mapped to {shard!r}, which is not a file name")
        if found.setdefault(name, shard) != shard:
            raise DuplicateTensor(f"{path}: {name} is mapped to both {found[name]} and {shard}")
    return found


def _compare(checkpoint: Checkpoint, weight_map: dict[str, str]) -> None:
    homes = {tensor.name: shard.path.name for shard in checkpoint.shards for tensor in shard.tensors}
    for name, shard in weight_map.items():
        if name not in homes:
            raise IndexDisagrees(f"{checkpoint.directory / INDEX_NAME}: {name} is not in {shard}, nor in another shard")
        if homes[name] != shard:
            raise IndexDisagrees(f"{checkpoint.directory / INDEX_NAME}: {name} is in {homes[name]}, not in {shard}")
    for name, shard in homes.items():
        if name not in weight_map:
            raise IndexDisagrees(f"{checkpoint.directory / shard}: {name} is not named by {INDEX_NAME}")


def _parse_json(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    """The members of a JSON object, nested objects too, as pairs: a dict would hide a name that occurs twice."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_Members)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{path}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, _Members):
        raise MalformedFile(f"{path}: must hold a JSON object")
    return value


class _Members(list[tuple[str, Any]]):
    """A JSON object as its members in order; told apart from a JSON array by its type."""


def _parse_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    fields = dict(entry) if isinstance(entry, _Members) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise MalformedFile(f"{path}: {name}: needs dtype, shape and data_offsets")
    if dtype not in DTYPE_BITS:
        raise MalformedFile(f"{path}: {name}: unknown dtype {dtype!r}")
    start, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if start > end or bits != (end - start) * 8:
        raise MalformedFile(
            f"{path}: {name}: {dtype} {list(shape)} needs {bits // 8} bytes, offsets are [{start}, {end})"
        )
    return StoredTensor(name, dtype, shape, data_start + start, data_start + end)


def _counts(value: Any) -> tuple[int, ...] | None:
    plain = isinstance(value, list) and not isinstance(value, _Members)
    return tuple(value) if plain and all(type(number) is int and number >= 0 for number in value) else None
