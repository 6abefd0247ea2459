"""Weights from disk into parameters: reader threads in file order, one copy where no cast is needed.

Threads call `preadv` and a packer, which is no torch; casts and device copies stay on the calling thread, because two
threads that call torch make two OpenMP teams. What a packer takes is read into a buffer that a near cache holds and
packed from there: the file's bytes never have memory of their own. Buffered reads, no mmap: a file cut short during the
load is an exception here and SIGBUS there.

Knows no model family (routes say what goes where) and no configuration. Exactness: E0, or one rounding per cast.
Speed: benchmarks/load_weights.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor, nn

from penstock.config.quantization import CheckpointQuantization
from penstock.nn.weights.errors import CheckpointError, TiedWeightsDiffer, TruncatedShard, WrongDtype
from penstock.nn.weights.headers import read_checkpoint
from penstock.nn.weights.layout import Extent, Filling, Layout, Packer, Piece, cut, match
from penstock.nn.weights.quantized import find_quantized, load_quantized
from penstock.nn.weights.routes import Route

CHUNK_BYTES = 16 * 1024 * 1024
MIN_CHUNK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. `bytes` were read for parameters; `casts`: "BF16 -> float32" -> number of tensors."""

    bytes: int
    seconds: float
    num_tensors: int
    num_shards: int
    casts: dict[str, int]

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


def load_weights(
    directory: str | Path,
    model: nn.Module,
    routes: Sequence[Route],
    *,
    threads: int = 2,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int, int], None] | None = None,
    packer: Packer | None = None,
    quantization: CheckpointQuantization | None = None,
) -> LoadReport:
    """Fill every parameter of `model` from the safetensors in `directory`; dtype and device are the parameters'.

    Modules that are quantized by `quantization` come first and are offered to the packer; those it does not want are
    dequantized into their parameters. `progress(done_bytes, total_bytes)` is called on this thread, as is
    `packer.take(parameter)` once all of it is there. Extra memory: (threads + 1) chunks, and only when something is
    cast, packed or goes to a device. Raises a CheckpointError; what can be known without reading weights is found
    before anything is written. An error after that empties all parameters, so a half-loaded model cannot be run.
    """
    if threads < 1 or chunk_bytes < MIN_CHUNK_BYTES:
        raise ValueError(f"threads must be >= 1 and chunk_bytes >= {MIN_CHUNK_BYTES}")
    begin = time.perf_counter()
    checkpoint = read_checkpoint(directory)
    modules = [] if quantization is None else find_quantized(checkpoint, model, routes, quantization)
    layout = match(checkpoint, model, routes, packer, modules)
    counted = _Progress(layout.num_bytes + sum(module.num_bytes for module in modules), progress or _no_progress)
    try:
        with torch.no_grad(), _one_torch_thread():
            counted(0)
            load_quantized(modules, packer, threads=threads, progress=counted)
            extents = cut(layout.fillings, chunk_bytes)
            _stream(extents, threads, counted, layout, packer)
            packed = {id(filling.parameter): filling for filling in layout.fillings if filling.packed}
            for extent in cut(layout.ties, chunk_bytes):
                _compare(extent, packed)
            if packer is not None:
                for filling in layout.ties:  # needed until now
                    with _named(filling):
                        packer.take(filling.parameter)
    except BaseException:
        for parameter in model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        raise
    num_tensors = len(layout.fillings) + sum(len(module.tensors) for module in modules)
    return LoadReport(counted.total, time.perf_counter() - begin, num_tensors, len(checkpoint.shards), layout.casts)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Casts run on this thread alone: an OpenMP team would wait at its barrier for cores that the readers hold.

    On 2 cores, bf16 to fp32 of 645 MB: 0.06 s with one thread, 0.15 s with two, seconds when other programs run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _no_progress(done_bytes: int, total_bytes: int) -> None:
    pass


class _Progress:
    """Counts bytes and tells how many of how many there are."""

    def __init__(self, total: int, tell: Callable[[int, int], None]) -> None:
        self.total, self._done, self._tell = total, 0, tell

    def __call__(self, more: int) -> None:
        self._done += more
        self._tell(self._done, self.total)


class _Readers:
    """Threads that read extents in order. `finished` hands over (extent, slot or None), or a thread's exception."""

    def __init__(
        self, extents: Sequence[Extent], files: dict[Path, int], threads: int, pinned: bool, packer: Packer | None
    ) -> None:
        self.finished: SimpleQueue[tuple[Extent, Tensor | None] | BaseException] = SimpleQueue()
        self._files = files
        self._packer = packer
        self._extents = iter(extents)
        self._lock = threading.Lock()
        self._stopped = False
        self._slots: SimpleQueue[Tensor | None] = SimpleQueue()
        slot_bytes = max((extent.slot_bytes for extent in extents), default=0)
        if slot_bytes:
            for _ in range(threads + 1):  # one is being emptied while each thread fills its own
                self._slots.put(torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=pinned))
        self._threads = [threading.Thread(target=self._run, name=f"load-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def give_back(self, slot: Tensor) -> None:
        self._slots.put(slot)

    def stop(self) -> None:
        self._stopped = True
        for _ in self._threads:
            self._slots.put(None)  # wakes who waits for a slot
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped:
                with self._lock:
                    extent = next(self._extents, None)
                if extent is None:
                    return
                slot = None
                if extent.slot_bytes:
                    slot = self._slots.get()
                    if slot is None:
                        return
                _read(self._files[extent.path], extent, slot)
                if self._packer is not None and slot is not None:
                    _pack(extent, slot, self._packer)
                self.finished.put((extent, slot))
        except BaseException as error:  # handed to the thread that waits: a reader that dies silently is a hang
            self.finished.put(error)


def _stream(
    extents: Sequence[Extent],
    threads: int,
    progress: Callable[[int], None],
    layout: Layout,
    packer: Packer | None,
) -> None:
    total, done = layout.num_bytes, 0
    missing: Counter[int] = Counter()  # bytes, by id of the parameter
    for filling in layout.fillings:
        missing[id(filling.parameter)] += filling.stored.end - filling.stored.start
    packed = {id(filling.parameter) for filling in layout.fillings if filling.packed}
    compared = {id(filling.parameter) for filling in layout.ties} - packed  # these are still looked at afterwards
    pinned = any(filling.target.is_cuda for filling in layout.fillings)
    with ExitStack() as stack:
        files = {}
        for path in dict.fromkeys(extent.path for extent in extents):
            files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, files[path])
        readers = _Readers(extents, files, min(threads, max(len(extents), 1)), pinned, packer)
        stack.callback(readers.stop)  # runs before the files are closed
        for _ in extents:
            item = readers.finished.get()
            if isinstance(item, BaseException):
                raise item
            extent, slot = item
            if slot is not None:
                for piece, values in _slot_pieces(extent, slot):
                    if not piece.filling.packed:
                        _scatter(piece, values)
                readers.give_back(slot)
            for piece in extent.pieces:
                parameter = piece.filling.parameter
                missing[id(parameter)] -= piece.end - piece.start
                if packer is not None and not missing[id(parameter)] and id(parameter) not in compared:
                    with _named(piece.filling):
                        packer.take(parameter)
            done += extent.end - extent.start
            progress(extent.end - extent.start)
    assert done == total, f"read {done} of {total} bytes"


def _read(file: int, extent: Extent, slot: Tensor | None) -> None:
    """Fill the extent's pieces with as few `preadv` as the kernel allows. Raises TruncatedShard at an early end."""
    raw_slot = None if slot is None else slot.numpy().data
    buffers = []
    for piece in extent.pieces:
        if piece.slot_offset < 0:
            assert piece.filling.raw is not None
            offset = piece.start - piece.filling.stored.start
            buffers.append(piece.filling.raw[offset : offset + piece.end - piece.start])
        else:
            assert raw_slot is not None
            buffers.append(raw_slot[piece.slot_offset : piece.slot_offset + piece.end - piece.start])
    position = extent.start
    while buffers:
        try:
            count = os.preadv(file, buffers, position)
        except OSError as error:
            raise CheckpointError(f"{extent.path}: {error.strerror} at byte {position}") from None
        if count == 0:
            name = next(piece.filling.stored.name for piece in extent.pieces if position < piece.end)
            raise TruncatedShard(f"{extent.path}: ends at byte {position}, inside {name}: it changed during the load")
        position += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]


def _slot_pieces(extent: Extent, slot: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """The slot's pieces with their values as they are stored."""
    for piece in extent.pieces:
        if piece.slot_offset >= 0:
            raw = slot[piece.slot_offset : piece.slot_offset + piece.end - piece.start]
            yield piece, raw.view(piece.filling.dtype)


def _pack(extent: Extent, slot: Tensor, packer: Packer) -> None:
    raw = slot.numpy()
    for piece in extent.pieces:
        filling = piece.filling
        if filling.packed:
            words = raw[piece.slot_offset : piece.slot_offset + piece.end - piece.start].view(np.uint16)
            row = filling.first_row + (piece.start - filling.stored.start) // filling.row_bytes
            with _named(filling):
                packer.put(filling.parameter, row, words.reshape(-1, filling.parameter.shape[1]))


@contextmanager
def _named(filling: Filling) -> Iterator[None]:
    """What a packer says of values that it cannot hold, with the tensor's name."""
    try:
        yield
    except ValueError as error:
        raise WrongDtype(f"{filling.path}: {filling.stored.name}: {error}") from None


def _scatter(piece: Piece, values: Tensor) -> None:
    target = piece.filling.target[piece.first : piece.first + piece.num_elements]
    target.copy_(values)
    if target.dtype == torch.float16 and piece.filling.dtype != torch.float16 and not target.isfinite().all():
        raise WrongDtype(
            f"{piece.filling.path}: {piece.filling.stored.name} has values that float16 cannot hold: use bfloat16"
        )


def _compare(extent: Extent, packed: dict[int, Filling]) -> None:
    """The pieces equal what the parameters hold already, bit for bit after the cast; the file's bytes where packed."""
    for piece, values in _slot_pieces(extent, _read_alone(extent)):
        filling = packed.get(id(piece.filling.parameter))
        if filling is None:
            held = piece.filling.target[piece.first : piece.first + piece.num_elements].cpu()
        else:
            start = filling.stored.start + piece.start - piece.filling.stored.start
            same = Piece(filling, start, start + piece.end - piece.start, 0)
            other = Extent(filling.path, same.start, same.end, [same], same.end - same.start)
            held = _read_alone(other).view(filling.dtype)
        if not torch.equal(values.to(held.dtype).view(torch.uint8), held.view(torch.uint8)):
            raise TiedWeightsDiffer(
                f"{extent.path}: {piece.filling.stored.name} differs from the tensor that tie_word_embeddings names: "
                "set it to false in config.json"
            )


def _read_alone(extent: Extent) -> Tensor:
    """A slot of its own with the extent's pieces."""
    slot = torch.empty(extent.slot_bytes, dtype=torch.uint8)
    with open(extent.path, "rb", buffering=0) as file:
        _read(file.fileno(), extent, slot)
    return slot
