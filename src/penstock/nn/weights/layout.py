"""From checkpoint and model to a reading list: what each parameter needs, checked, cut into extents in file order.

Reads no weight and starts no thread: everything that can be known to be wrong before reading is found here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from penstock.nn.weights.errors import MissingTensor, TiedWeightsDiffer, UnknownTensor, WrongDtype, WrongShape
from penstock.nn.weights.headers import Checkpoint, Shard, StoredTensor
from penstock.nn.weights.quantized import QuantizedModule, QuantizedPacker
from penstock.nn.weights.routes import Route

# Any of these becomes any other; everything else needs a quantization scheme.
FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Tables that old checkpoints store and every model computes for itself.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias")
MAX_PIECES = 256  # of an extent: one preadv takes at most IOV_MAX = 1024 buffers
# On the CPU a cast reads what `preadv` has just written: 4 MiB are still in the cache then (16 MiB: a fifth slower).
CAST_CHUNK_BYTES = 4 * 1024 * 1024
# What is packed goes through the nearest cache of its own: read by `preadv`, out of there into its place by the packer.
PACK_CHUNK_BYTES = 1024 * 1024
PACK_ROWS = 16  # rows of a packed block: pieces for a packer are cut there
_SLOT_ALIGN = 64  # bytes; a slot is viewed as float32 at piece starts, and packers read it in whole cache lines


class Packer(QuantizedPacker, Protocol):
    """Keeps some parameters in a form of its own, filled straight from the file: their own memory is never touched."""

    def wants(self, parameter: nn.Parameter) -> bool:
        """Asked once per parameter, before anything is read; only where all of it is stored in its own dtype."""
        ...

    def put(self, parameter: nn.Parameter, row: int, words: np.ndarray) -> None:
        """Rows [row, row + n) of a wanted parameter: uint16 [n, K], gone afterwards. From several threads at once.

        `row` is a multiple of 16, and so is n but at the end of the parameter. Raises ValueError for values that its
        form cannot hold, as does `take`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Filling:
    """Tensor `stored` of `path` goes into `target`: a flat view [n] of parameter memory, in the parameter's dtype.

    `raw` is the same memory as bytes when the file's bytes can be read straight into it: equal dtype, on the CPU.
    `first_row`: of the parameter. `packed`: the rows go to the packer and `target` stays as it is.
    """

    path: Path
    stored: StoredTensor
    parameter: nn.Parameter
    target: Tensor
    raw: memoryview | None
    first_row: int = 0
    packed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return FLOAT_DTYPES[self.stored.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return (self.stored.end - self.stored.start) // max(self.stored.shape[0], 1)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, end) of the file, a part of one filling cut at element borders, or at blocks of rows to pack."""

    filling: Filling
    start: int
    end: int
    slot_offset: int  # where the bytes lie in the slot; -1 when they are read straight into the parameter

    @property
    def first(self) -> int:
        """Element of `filling.target` that byte `start` belongs to."""
        return (self.start - self.filling.stored.start) // self.filling.dtype.itemsize

    @property
    def num_elements(self) -> int:
        return (self.end - self.start) // self.filling.dtype.itemsize


@dataclass(slots=True)
class Extent:
    """Neighbouring pieces of one file, read by one call."""

    path: Path
    start: int
    end: int
    pieces: list[Piece] = field(default_factory=list)
    slot_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """What to read (`fillings`, in file order) and what to compare after that (`ties`)."""

    fillings: tuple[Filling, ...]
    ties: tuple[Filling, ...]
    casts: dict[str, int]  # "BF16 -> float32": number of tensors

    @property
    def num_bytes(self) -> int:
        """Bytes to read for the parameters, without the comparisons."""
        return sum(f.stored.end - f.stored.start for f in self.fillings)


def match(
    checkpoint: Checkpoint,
    model: nn.Module,
    routes: Sequence[Route],
    packer: Packer | None = None,
    quantized: Sequence[QuantizedModule] = (),
) -> Layout:
    """Pair stored tensors with parameters. Raises a CheckpointError unless every parameter is filled exactly once.

    What `quantized` modules fill counts and is left out of the layout. The packer is asked last, when nothing is wrong.
    Errors: UnknownTensor, MissingTensor, WrongShape, WrongDtype, TiedWeightsDiffer. A route that names no parameter of
    the model, or rows that overlap, are bugs of the family and fail an assertion.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    strays = [route.target for route in routes if route.target not in parameters]
    assert not strays, f"routes name no parameter: {strays}"
    homes = {tensor.name: (shard, tensor) for shard in checkpoint.shards for tensor in shard.tensors}
    apart = {module.route.source for module in quantized}
    present = apart | homes.keys()
    chosen = {route.source: route for route in routes if route.kind == "fill" and route.source in present}
    ties = []
    filled = {id(parameters[route.target]) for route in chosen.values()}  # tied modules share one parameter
    for route in routes:
        if route.kind == "tied" and route.source in present:
            if id(parameters[route.target]) in filled and route.source in apart:
                raise TiedWeightsDiffer(
                    f"{checkpoint.directory}: holds {route.source} quantized beside the tensor that "
                    "tie_word_embeddings names: set it to false in config.json"
                )
            if id(parameters[route.target]) in filled:
                ties.append(route)
            else:  # only the second name of a tied pair is stored
                chosen[route.source] = route
                filled.add(id(parameters[route.target]))
    known = {route.source for route in routes} | {t.name for module in quantized for _, t in module.tensors}
    for name, (shard, _) in homes.items():
        if name not in known and not name.endswith(IGNORED_SUFFIXES):
            raise UnknownTensor(f"{shard.path}: the model has no place for tensor {name}")
    _check_cover(checkpoint, parameters, routes, chosen)
    fillings = [_filling(*homes[name], parameters, route) for name, route in chosen.items() if name not in apart]
    order = {shard.path: n for n, shard in enumerate(checkpoint.shards)}
    fillings.sort(key=lambda f: (order[f.path], f.stored.start))
    casts: dict[str, int] = {}
    for f in fillings:
        if f.dtype != f.target.dtype:
            key = f"{f.stored.dtype} -> {str(f.target.dtype).removeprefix('torch.')}"
            casts[key] = casts.get(key, 0) + 1
    compared = [replace(_filling(*homes[route.source], parameters, route), raw=None) for route in ties]
    if packer is not None:
        fillings = _packed(fillings, compared, packer)
    return Layout(tuple(fillings), tuple(compared), casts)


def _packed(fillings: Sequence[Filling], compared: Sequence[Filling], packer: Packer) -> list[Filling]:
    """The fillings, those of parameters that the packer wants and can be given marked so."""
    possible = {id(f.parameter): f.parameter for f in fillings if f.parameter.dim() == 2}
    rows: Counter[int] = Counter()
    for f in fillings:
        rows[id(f.parameter)] += f.stored.shape[0]
    for key in [key for key, parameter in possible.items() if rows[key] < parameter.shape[0]]:
        del possible[key]  # its other rows are quantized, and dequantized into its memory
    for f in fillings:
        ends = f.first_row + f.stored.shape[0]
        whole = f.first_row % PACK_ROWS == 0 and (ends % PACK_ROWS == 0 or ends == f.parameter.shape[0])
        if f.raw is None or not whole or f.dtype.itemsize != 2:
            possible.pop(id(f.parameter), None)
    for f in compared:
        if f.dtype != f.parameter.dtype:  # else the two names' bytes in the files are compared
            possible.pop(id(f.parameter), None)
    wanted = {key for key, parameter in possible.items() if packer.wants(parameter)}
    return [replace(f, raw=None, packed=True) if id(f.parameter) in wanted else f for f in fillings]


def cut(fillings: Iterable[Filling], chunk_bytes: int) -> list[Extent]:
    """Extents of at most `chunk_bytes`, in file order. Pieces are cut at element borders; gaps start a new extent."""
    extents: list[Extent] = []
    for filling in fillings:
        stored, size = filling.stored, filling.dtype.itemsize
        cast = filling.raw is None and filling.target.device.type == "cpu"
        limit = min(chunk_bytes, CAST_CHUNK_BYTES) if cast else chunk_bytes
        if filling.packed:
            size, limit = PACK_ROWS * filling.row_bytes, min(chunk_bytes, PACK_CHUNK_BYTES)
        start = stored.start
        while start < stored.end:
            extent = extents[-1] if extents else None
            if (
                extent is None
                or extent.path != filling.path
                or extent.end != start
                or extent.end - extent.start > limit - size
                or len(extent.pieces) == MAX_PIECES
            ):
                extent = Extent(filling.path, start, start)
                extents.append(extent)
            room = max(limit - (extent.end - extent.start), size) // size * size
            end = min(stored.end, start + room)
            offset = -1
            if filling.raw is None:
                offset = extent.slot_bytes
                extent.slot_bytes += -(-(end - start) // _SLOT_ALIGN) * _SLOT_ALIGN
            extent.pieces.append(Piece(filling, start, end, offset))
            extent.end = start = end
    return extents


def _filling(shard: Shard, stored: StoredTensor, parameters: dict[str, nn.Parameter], route: Route) -> Filling:
    parameter = parameters[route.target]
    rows = parameter.detach() if route.rows is None else parameter.detach()[route.rows[0] : route.rows[1]]
    if stored.shape != tuple(rows.shape):
        raise WrongShape(
            f"{shard.path}: {stored.name} has shape {list(stored.shape)}, config.json asks for {list(rows.shape)}"
        )
    if stored.dtype not in FLOAT_DTYPES or parameter.dtype not in FLOAT_DTYPES.values():
        raise WrongDtype(
            f"{shard.path}: {stored.name} is {stored.dtype}, which cannot become "
            f"{str(parameter.dtype).removeprefix('torch.')}; loadable: {', '.join(FLOAT_DTYPES)}"
        )
    assert rows.is_contiguous(), f"{route.target} is not contiguous"
    flat = rows.view(-1)
    direct = parameter.device.type == "cpu" and FLOAT_DTYPES[stored.dtype] == parameter.dtype
    raw = flat.view(torch.uint8).numpy().data if direct else None
    return Filling(shard.path, stored, parameter, flat, raw, 0 if route.rows is None else route.rows[0])


def _check_cover(
    checkpoint: Checkpoint,
    parameters: dict[str, nn.Parameter],
    routes: Sequence[Route],
    chosen: dict[str, Route],
) -> None:
    """Every parameter's rows are filled once: what is absent from the checkpoint is the user's error, the rest ours."""
    by_other_name = {id(parameters[route.target]) for route in chosen.values() if route.kind == "tied"}
    absent = (route for route in routes if route.kind == "fill" and route.source not in chosen)
    missing = [route for route in absent if id(parameters[route.target]) not in by_other_name]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(route.source for route in missing[:3])
        raise MissingTensor(f"{checkpoint.directory}: the checkpoint does not hold {names}{more}")
    ranges: dict[int, list[tuple[int, int]]] = {}
    for route in chosen.values():
        parameter = parameters[route.target]
        ranges.setdefault(id(parameter), []).append(route.rows or (0, parameter.shape[0]))
    for name, parameter in parameters.items():
        position = 0
        for start, end in sorted(ranges.get(id(parameter), [])):
            assert start == position, f"routes leave a gap or overlap at row {position} of {name}"
            position = end
        if position != parameter.shape[0]:
            raise MissingTensor(f"{checkpoint.directory}: nothing in the checkpoint fills all of {name}")
