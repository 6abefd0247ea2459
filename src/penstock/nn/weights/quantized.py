"""Quantized modules of a checkpoint: found and checked in the headers, read one by one, handed on as they are stored.

Knows the tensors of the compressed-tensors format (`weight_packed` or `weight`, `weight_scale`, `weight_shape`) and no
kernel and no model family. Threads only read; numbers are looked at on the calling thread. Extra memory: the tensors of
threads + 1 modules. Exactness: integers and scales arrive bit for bit (E0); `dequantize` rounds once, to the
parameter's dtype. Source: github.com/vllm-project/compressed-tensors, compressors/pack_quantized and naive_quantized.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from penstock.config.quantization import NATIVE_GROUP, CheckpointQuantization, WeightScheme
from penstock.nn.quant.rotation import hadamard, rotate
from penstock.nn.weights.errors import (
    BadQuantization,
    CheckpointError,
    MissingTensor,
    TruncatedShard,
    WrongDtype,
    WrongShape,
)
from penstock.nn.weights.headers import Checkpoint, StoredTensor
from penstock.nn.weights.routes import Route

SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MATRIX_DTYPES = SCALE_DTYPES | {"F64": torch.float64}
SHAPE_DTYPES: dict[str, type[np.generic]] = {"I64": np.int64, "I32": np.int32}
_ELEMENTS_AT_ONCE = 1 << 22  # dequantized together: bounds the float32 copy to 16 MiB


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """A projection in the checkpoint: which of its tensors lie where, and which rows of which parameter it fills.

    `whole`: the parameter's other rows have the same scheme, so that it can be held as it is stored.
    """

    name: str
    route: Route
    parameter: nn.Parameter
    start: int  # row of the parameter
    shape: tuple[int, int]
    scheme: WeightScheme
    whole: bool
    integers: tuple[Path, StoredTensor]
    scales: tuple[Path, StoredTensor]
    stored_shape: tuple[Path, StoredTensor] | None
    rotation: tuple[Path, StoredTensor] | None  # its matrix

    @property
    def tensors(self) -> tuple[tuple[Path, StoredTensor], ...]:
        """Integers, scales, and what else is there."""
        more = (each for each in (self.stored_shape, self.rotation) if each is not None)
        return (self.integers, self.scales, *more)

    @property
    def num_bytes(self) -> int:
        return sum(stored.end - stored.start for _, stored in self.tensors)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """The numbers of one module. shape [rows, K].

    integers: int8 [rows, K]; or, nibbles, uint8 [rows, ceil(K / 8) * 4] whose nibble k, low one first, stands for
    nibble - 8. scales: float32 [rows, groups]; group g is columns [g * group, (g + 1) * group).
    """

    shape: tuple[int, int]
    scheme: WeightScheme
    integers: np.ndarray
    scales: np.ndarray

    @property
    def nibbles(self) -> bool:
        return self.integers.dtype == np.uint8

    def native_scales(self) -> np.ndarray:
        """float32 [rows, groups of NATIVE_GROUP] for 4 bits, [rows, 1] for 8: equal values, repeated."""
        if self.scheme.bits == 8:
            return self.scales
        times = -(-self.shape[1] // NATIVE_GROUP) if self.scheme.group is None else self.scheme.group // NATIVE_GROUP
        repeated = np.repeat(self.scales, times, axis=1)[:, : -(-self.shape[1] // NATIVE_GROUP)]
        return np.ascontiguousarray(repeated)

    def dequantize(self, to: Tensor) -> None:
        """Integers times scales, computed in float32, into `to` [rows, K]; rotated ones are rotated back."""
        rows, k = self.shape
        step = max(_ELEMENTS_AT_ONCE // k, 1)
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            integers = unpack_nibbles(self.integers[part], k) if self.nibbles else self.integers[part]
            group = self.scheme.group or k
            scales = np.repeat(self.scales[part], group, axis=1)[:, :k]
            values = torch.from_numpy(integers.astype(np.float32) * scales)
            to[part].copy_(rotate(values, self.scheme.rotation) if self.scheme.rotation else values)


class QuantizedPacker(Protocol):
    """Keeps some parameters in a form of its own, also those that are quantized already."""

    def put_quantized(self, parameter: nn.Parameter, row: int, rows: QuantizedRows) -> bool:
        """Rows [row, ...) of a parameter whose rows all have one scheme. False: not wanted as they are."""
        ...

    def take(self, parameter: nn.Parameter) -> None:
        """All of a parameter is there, wanted or not: give back memory that is not needed any more."""
        ...


def unpack_nibbles(packed: np.ndarray, k: int) -> np.ndarray:
    """uint8 [rows, bytes] of low nibble first to int8 [rows, k] in [-8, 7]."""
    pairs = np.stack((packed & 15, packed >> 4), -1).reshape(packed.shape[0], -1)[:, :k]
    return pairs.view(np.int8) - np.int8(8)


def find_quantized(
    checkpoint: Checkpoint, model: nn.Module, routes: Sequence[Route], quantization: CheckpointQuantization
) -> list[QuantizedModule]:
    """The quantized modules that the routes lead to, in file order, checked as far as headers tell.

    A tied source counts where its tensors are stored. Raises MissingTensor, WrongShape, WrongDtype and BadQuantization
    (zero points, g_idx, rotations of nothing).
    """
    homes = {tensor.name: (shard.path, tensor) for shard in checkpoint.shards for tensor in shard.tensors}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    schemes: dict[int, set[WeightScheme | None]] = {}  # by parameter
    chosen: list[tuple[str, Route, WeightScheme]] = []
    idle = list(quantization.rotated)
    for route in routes:
        parameter = parameters[route.target]
        if parameter.dim() != 2 or not route.source.endswith(".weight"):
            continue
        name = route.source.removesuffix(".weight")
        stored = any(f"{name}.{tensor}" in homes for tensor in ("weight", "weight_packed", "weight_scale"))
        kind = "Embedding" if name.endswith("embed_tokens") else "Linear"
        scheme = quantization.scheme_of(name, kind)
        rotations = quantization.rotations_of(name, kind)
        idle = [each for each in idle if each not in rotations]
        if len(rotations) > 1 or (rotations and scheme is None):
            what = "rotates it twice" if scheme else "rotates it, and it is not quantized"
            raise BadQuantization(f"{checkpoint.directory}: config.json: {name}: transform_config {what}")
        if not stored and (scheme is None or route.kind == "tied"):
            continue  # another tensor fills the parameter, or `match` says that none does
        if scheme is None and f"{name}.weight" not in homes and f"{name}.weight_packed" in homes:
            raise BadQuantization(f"{checkpoint.directory}: config.json says that {name} is not quantized, but it is")
        schemes.setdefault(id(parameter), set()).add(scheme)
        if scheme is not None:
            chosen.append((name, route, scheme))
    if idle:  # rotated weights would meet inputs that are not
        what = f"transform_config {idle[0].name!r:.40} rotates none of this model's projections"
        raise BadQuantization(f"{checkpoint.directory}: config.json: {what}")
    found = []
    for name, route, scheme in chosen:
        parameter = parameters[route.target]
        start, end = route.rows or (0, parameter.shape[0])
        where = (name, route, parameter, start, (end - start, parameter.shape[1]), scheme)
        matrices = [f"{name}.{each.name}_input.weight" for each in quantization.rotated]
        rotation = next((homes[matrix] for matrix in matrices if matrix in homes and scheme.rotation), None)
        found.append(_module(checkpoint.directory, homes, where, len(schemes[id(parameter)]) == 1, rotation))
    order = {shard.path: number for number, shard in enumerate(checkpoint.shards)}
    return sorted(found, key=lambda module: (order[module.integers[0]], module.integers[1].start))


def _module(
    directory: Path,
    homes: dict[str, tuple[Path, StoredTensor]],
    where: tuple[str, Route, nn.Parameter, int, tuple[int, int], WeightScheme],
    whole: bool,
    rotation: tuple[Path, StoredTensor] | None,
) -> QuantizedModule:
    name, _, _, _, (rows, k), scheme = where
    for suffix, what in (("weight_zero_point", "zero points are"), ("weight_g_idx", "columns in activation order are")):
        if f"{name}.{suffix}" in homes:
            path, _ = homes[f"{name}.{suffix}"]
            raise BadQuantization(f"{path}: {name}.{suffix}: {what} not supported")
    if scheme.rotation and not scheme.activations:
        raise BadQuantization(f"{directory}: {name}: rotated inputs are supported where they are rounded to 8 bits")
    if scheme.rotation and k % scheme.rotation:
        raise BadQuantization(f"{directory}: {name}: {k} columns are no whole blocks of {scheme.rotation} to rotate")
    if rotation is not None:
        path, matrix = rotation
        if matrix.shape != (scheme.rotation, scheme.rotation) or matrix.dtype not in MATRIX_DTYPES:
            raise WrongShape(f"{path}: {matrix.name} must be {scheme.rotation} x {scheme.rotation} numbers")
    names = (f"{name}.weight_packed" if scheme.packed else f"{name}.weight", f"{name}.weight_scale")
    missing = [tensor for tensor in names if tensor not in homes]
    if missing:
        raise MissingTensor(f"{directory}: the checkpoint does not hold {', '.join(missing)}, config.json promises it")
    (path, integers), (scale_path, scales) = (homes[tensor] for tensor in names)
    columns = -(-k * scheme.bits // 32) if scheme.packed else k
    if integers.shape != (rows, columns):
        raise WrongShape(
            f"{path}: {integers.name} has shape {list(integers.shape)}, {scheme.bits} bits of [{rows}, {k}] need "
            f"{[rows, columns]}"
        )
    wanted = "I32" if scheme.packed else "I8"
    if integers.dtype != wanted:
        raise WrongDtype(f"{path}: {integers.name} is {integers.dtype}, config.json promises {wanted}")
    if scales.dtype not in SCALE_DTYPES:
        raise WrongDtype(f"{scale_path}: {scales.name} is {scales.dtype}; loadable: {', '.join(SCALE_DTYPES)}")
    groups = 1 if scheme.group is None else -(-k // scheme.group)
    shapes = [(), (1,), (1, 1)] if scheme.per_matrix else [(rows, groups), *([(rows,)] if groups == 1 else [])]
    if scales.shape not in shapes:
        per = "the matrix" if scheme.per_matrix else "each row" if scheme.group is None else f"{scheme.group} columns"
        raise WrongShape(
            f"{scale_path}: {scales.name} has shape {list(scales.shape)}, one scale for {per} of [{rows}, {k}] is "
            f"{list(shapes[0])}"
        )
    shape = homes.get(f"{name}.weight_shape") if scheme.packed else None
    if shape is not None and (shape[1].dtype not in SHAPE_DTYPES or shape[1].shape != (2,)):
        raise WrongShape(f"{shape[0]}: {shape[1].name} must be two whole numbers")
    return QuantizedModule(*where, whole, (path, integers), (scale_path, scales), shape, rotation)


def load_quantized(
    modules: Sequence[QuantizedModule],
    packer: QuantizedPacker | None,
    *,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    """Read every module and offer it to the packer; where that says no, it is dequantized.

    `progress`: bytes read more. Raises a CheckpointError for files that end early and for scales and integers that
    cannot be.
    """
    waiting: dict[int, int] = {}
    for module in modules:
        waiting[id(module.parameter)] = waiting.get(id(module.parameter), 0) + module.shape[0]
    with ExitStack() as stack:
        files = {}
        for path in dict.fromkeys(path for module in modules for path, _ in module.tensors):
            files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, files[path])
        ahead = stack.enter_context(closing(_read_ahead(modules, files, threads)))  # ends before the files are closed
        for module, raw in ahead:
            rows = _checked(module, raw)
            taken = False
            if packer is not None and module.whole and module.scheme.native is not None:
                taken = packer.put_quantized(module.parameter, module.start, rows)
            if not taken:
                rows.dequantize(module.parameter.detach()[module.start : module.start + module.shape[0]])
                waiting[id(module.parameter)] -= module.shape[0]
                if packer is not None and not waiting[id(module.parameter)] and module.whole:
                    packer.take(module.parameter)
            progress(module.num_bytes)


def _read_ahead(
    modules: Sequence[QuantizedModule], files: dict[Path, int], threads: int
) -> Generator[tuple[QuantizedModule, list[np.ndarray]], None, None]:
    """Modules in order with their tensors' bytes, `threads` of them being read meanwhile."""
    with ThreadPoolExecutor(threads, "load") as pool:
        ahead: list[Future[list[np.ndarray]]] = []
        rest = iter(modules)
        try:
            for module in modules:
                while len(ahead) <= threads and (following := next(rest, None)) is not None:
                    ahead.append(pool.submit(_read, following, files))
                yield module, ahead.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(module: QuantizedModule, files: dict[Path, int]) -> list[np.ndarray]:
    found = []
    for path, stored in module.tensors:
        raw = np.empty(stored.end - stored.start, np.uint8)
        done = 0
        while done < raw.nbytes:
            try:
                count = os.preadv(files[path], [raw[done:].data], stored.start + done)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror} at byte {stored.start + done}") from None
            if count == 0:
                raise TruncatedShard(f"{path}: ends inside {stored.name}: it changed during the load")
            done += count
        found.append(raw)
    return found


def _checked(module: QuantizedModule, raw: list[np.ndarray]) -> QuantizedRows:
    (rows, k), scheme = module.shape, module.scheme
    if module.stored_shape is not None:
        path, stored = module.stored_shape
        shape = raw[2].view(SHAPE_DTYPES[stored.dtype]).tolist()
        if shape != [rows, k]:
            raise WrongShape(f"{path}: {stored.name} says {shape}, config.json asks for {[rows, k]}")
    if module.rotation is not None:
        path, stored = module.rotation
        matrix = torch.from_numpy(raw[-1]).view(MATRIX_DTYPES[stored.dtype]).view(stored.shape).float()
        if not torch.equal(matrix, hadamard(scheme.rotation)):
            raise BadQuantization(f"{path}: {stored.name} is not the Hadamard matrix that config.json promises")
    path, stored = module.scales
    scales = torch.from_numpy(raw[1]).view(SCALE_DTYPES[stored.dtype]).float().numpy()
    if not np.isfinite(scales).all():
        raise BadQuantization(f"{path}: {stored.name} has values that are not finite")
    if scales.size and np.abs(scales).max() > np.finfo(np.float32).max / (1 << scheme.bits - 1):
        raise BadQuantization(f"{path}: {stored.name} has values whose products with integers are not finite")
    scales = np.full((rows, 1), scales.item(), np.float32) if scheme.per_matrix else scales.reshape(rows, -1)
    integers = raw[0].reshape(rows, -1)
    if not scheme.packed:
        integers = integers.view(np.int8)
        if scheme.bits == 4 and integers.size and (integers.min() < -8 or integers.max() > 7):
            raise BadQuantization(f"{module.integers[0]}: {module.integers[1].name} has values outside of 4 bits")
    elif scheme.bits == 8:
        integers = (integers ^ np.uint8(128)).view(np.int8)[:, :k]  # stored with 128 added
    return QuantizedRows((rows, k), scheme, integers, scales)
