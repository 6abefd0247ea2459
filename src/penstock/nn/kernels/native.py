"""The native CPU kernels: whether they are there, a model recorded as a native program, and that program as a model.

The modules of `nn.layers` and `nn.models` stay the specification: their `record` says once, in the order of `forward`,
which operations a step is made of; afterwards a step is one native call for all layers. Knows no model family and no
request. Weights are packed while recording and leave torch's memory one by one.

Exactness: a row's result does not depend on the batch, the chunking or the number of threads, bit for bit (E0); beside
plain torch it is E1.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.config.model import KVLayout
from penstock.nn.doors import Batch, Buffer, Recorder, Scores, Spans
from penstock.nn.kernels.edits import Ids, RowEdits, RowParams
from penstock.nn.weights.quantized import QuantizedRows
from penstock.nn.words import StepWords

log = logging.getLogger("penstock.nn")
extension: ModuleType | None = None
why_missing = ""
try:
    import penstock._native as extension
except ImportError as missing:
    why_missing = str(missing)

FORMATS = {"bf16": 0, "int8": 1, "w8a8": 2, "int4": 3, "w4a8": 4}  # as native/src/kernels.hpp numbers them
KV_FORMATS = {"bfloat16": 0, "int8": 1}
KV_PACKING = "paired"  # as KVGroup names the order of both
F32, BF16 = 0, 1
COLUMNS = 16  # output columns of a packed block


class Unsupported(Exception):
    """The model has something that native kernels cannot compute and plain torch can. Says what."""


class Recordable(Protocol):
    """A model that can be recorded, a torch module. `head`: weight [vocab_size, hidden] and bias or None."""

    head: Any

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...

    def record(self, to: Recorder) -> Buffer: ...


def load_native() -> ModuleType:
    """The extension module. Raises Unsupported where it was not built or does not load."""
    if extension is None:
        raise Unsupported(f"the native kernels were not built here ({why_missing})")
    return extension


@functools.cache
def usable_kernels() -> tuple[str, ...]:
    """Names of the instruction sets that native kernels can use here, best first. Empty without the extension.

    Each is compared with the plainest on a small product of every format and on tokens chosen from it (a millisecond):
    one that gives something else on this machine is left out, with a warning.
    """
    if extension is None:
        return ()
    names: list[str] = extension.kernels()
    found = [name for name in names if name == names[-1] or _agree(extension, name, names[-1])]
    for name in set(names) - set(found):
        log.warning("the %s kernels compute wrong products on this machine and are not used", name)
    return tuple(found)


def _agree(native: ModuleType, name: str, plainest: str) -> bool:
    draw = torch.Generator().manual_seed(0)
    values, rows = (torch.randn(n, 200, generator=draw).bfloat16() for n in (50, 37))
    team = native.Team(1, [])
    for weight_format in FORMATS.values():
        weight = native.PackedWeight(weight_format, *values.shape)
        weight.fill(team, 0, _words(values))
        results = torch.zeros(2, len(rows), len(values))
        for kernels, result in zip((name, plainest), results, strict=True):
            native.Program(kernels, team, len(rows)).head(weight, _words(rows), result.numpy())
        if not torch.allclose(results[0], results[1], rtol=1e-3, atol=1e-2):
            return False
    draws = np.arange(len(rows))
    nucleus = np.full(len(rows), 0.9)
    params = RowParams((draws % 3).astype(np.float32), draws % 5, nucleus, 0 * nucleus, draws.astype(np.uint64), draws)
    tokens = [NativeScores(results[0], kernels).choose(params, None, draws[:0])[0] for kernels in (name, plainest)]
    return bool((tokens[0] == tokens[1]).all())


class PackedWeights:
    """The projections of a model in the order that native kernels read, packed as they come from disk.

    `formats`: of the layers' projections and of the head, keys of FORMATS. Raises Unsupported, before any weight is
    consumed, for a model that cannot be recorded. `arena`: of nn.kernels.arena, where they go as long as it lasts.
    E0 for bf16; the others lose what rounding to their grid loses (E3).
    """

    def __init__(
        self,
        model: Recordable,
        num_threads: int,
        formats: tuple[str, str] = ("bf16", "bf16"),
        arena: Any | None = None,
    ) -> None:
        self._native = load_native()
        self._arena = arena
        dtypes = {str(parameter.dtype).removeprefix("torch.") for _, parameter in model.named_parameters()}
        if dtypes != {"bfloat16"}:
            raise Unsupported(f"native kernels compute in bfloat16, these weights are {', '.join(sorted(dtypes))}")
        self._uses = {id(model.head.weight): _Use(model.head.weight, model.head.bias, formats[1], False)}
        model.record(_Planner(self._uses, formats[0]))
        self._packed: dict[int, Any] = {}
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.team = self._native.Team(num_threads, cpus if len(cpus) == num_threads else [])

    def wants(self, parameter: Tensor) -> bool:
        """Whether it is a projection, whose rows `put` takes from now on."""
        use = self._uses.get(id(parameter))
        if use is None or id(parameter) in self._packed:
            return False
        self._packed[id(parameter)] = self._empty(use.format, parameter)
        return True

    def put(self, parameter: Tensor, row: int, words: np.ndarray) -> None:
        """Pack rows [row, row + n) of a wanted parameter, bf16 as uint16 [n, K], on this thread; any thread may."""
        packed, half = self._packed[id(parameter)], parameter.shape[0] // 2
        if not self._uses[id(parameter)].interleaved:
            packed.fill(None, row, words)
            return
        gates = max(0, min(half - row, len(words)))  # rows of gate; the others are of up
        for first, part, offset in ((row, words[:gates], 0), (max(row, half) - half, words[gates:], COLUMNS)):
            if len(part):
                packed.fill(None, 2 * first + offset, part, every=2)

    def take(self, parameter: Tensor) -> None:
        """Pack a parameter that is complete, if it is a projection, and give its memory back to the system."""
        use = self._uses.get(id(parameter))
        if use is None or not parameter.numel():
            return
        if id(parameter) not in self._packed:
            packed = self._empty(use.format, parameter)
            rows = _interleaved(parameter) if use.interleaved else parameter.detach()
            packed.fill(self.team, 0, _words(rows))
            self._packed[id(parameter)] = packed
            self._native.release(_words(parameter))  # at once: a loader may hold views of this memory until its end
        parameter.data = torch.empty(0, dtype=parameter.dtype)

    def put_quantized(self, parameter: Tensor, start: int, rows: QuantizedRows) -> bool:
        """Pack rows [start, ...) of a projection that are quantized already, as they are (E0). False: it is none.

        All rows of a parameter come in one scheme, in any order.
        """
        use, native_format = self._uses.get(id(parameter)), rows.scheme.native
        if use is None or native_format is None:
            return False
        if id(parameter) not in self._packed:
            self._packed[id(parameter)] = self._empty(native_format, parameter)
            parameter.data = torch.empty(0, dtype=parameter.dtype)  # never touched, so it takes no memory yet
        packed, step = self._packed[id(parameter)], 1
        if use.interleaved:
            assert start in (0, rows.shape[0])
            start, step = (COLUMNS if start else 0), 2
        fill = packed.fill_nibbles if rows.nibbles else packed.fill_quantized
        fill(self.team, start, step, rows.integers, rows.native_scales())
        return True

    def _empty(self, weight_format: str, parameter: Tensor) -> Any:
        return self._native.PackedWeight(FORMATS[weight_format], *parameter.shape, self._arena)

    def finish(self) -> None:
        """Everything is packed: give back what the arena holds in vain."""
        if self._arena is not None:
            self._arena.finish()

    def find(self, parameter: Tensor) -> Any | None:
        """The packed form of a projection; None for a parameter that is none. Packs what was not taken before."""
        use = self._uses.get(id(parameter))
        if use is None:
            return None
        if id(parameter) not in self._packed:
            self.take(parameter)
        packed = self._packed[id(parameter)]
        if use.bias is not None:
            packed.set_bias(_floats(_interleaved(use.bias) if use.interleaved else use.bias))
        return packed

    @property
    def num_bytes(self) -> int:
        return sum(packed.num_bytes for packed in self._packed.values())


class NativeModel:
    """A model whose steps run natively: what `runner.Model` asks for.

    `kernels`: one of `usable_kernels`. `max_tokens`: of a step. Raises Unsupported for a cache it cannot use.
    """

    def __init__(
        self,
        model: Recordable,
        weights: PackedWeights,
        layout: KVLayout,
        pools: Sequence[Tensor],
        *,
        kernels: str,
        max_tokens: int,
    ) -> None:
        native = load_native()
        check_layout(layout)
        self._weights = weights
        self._program = native.Program(kernels, weights.team, max_tokens)
        recorder = _Recorder(weights, self._program, layout, pools)
        self._head = weights.find(model.head.weight)
        self._hidden = model.record(recorder)
        weights.finish()
        self._kept = recorder.kept  # memory that the program reads
        self._tensors = torch.empty(0), torch.empty(0)  # of the last batch
        self._arrays = self._tensors[0].numpy(), self._tensors[1].numpy()  # the same memory

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states bf16 [T, hidden] after the last norm."""
        hidden = torch.empty(len(batch.token_ids), self._hidden.width, dtype=torch.bfloat16)
        self._run(batch, _words(hidden))
        return hidden

    def _run(self, batch: Batch, hidden: np.ndarray) -> None:
        """The layers, then their hidden states into `hidden`, bf16 as uint16 [T, hidden]."""
        step = batch.attention
        assert isinstance(step, NativeStep)
        arrays = *self._views(batch), step.query_start, step.start, step.tables
        if (words := step.words) is None:
            self._program.run(*arrays)
        else:
            words.went_on_without(self._program.run(*arrays, words.done, words.loads, words.patience_s))
        self._program.read(self._hidden.number, hidden)

    def _views(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The batch's tensors as arrays. Steady decoding brings the same tensors again and again."""
        if batch.token_ids is not self._tensors[0] or batch.positions is not self._tensors[1]:
            self._tensors = batch.token_ids, batch.positions
            self._arrays = batch.token_ids.numpy(), batch.positions.numpy()
        return self._arrays

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden bf16 [N, hidden] to float32 [N, vocab_size]."""
        assert self._head is not None
        scores = torch.empty(hidden.shape[0], self._head.n)
        self._program.head(self._head, _words(hidden.contiguous()), scores.numpy())
        return scores

    def scores(self, hidden: Tensor) -> Scores:
        return _HeadScores(self._program, self._head, _words(hidden.contiguous()))

    def scores_after(self, batch: Batch) -> Scores:
        """The layers run when somebody chooses: nothing but native calls then, for they leave the caches cold."""
        hidden = np.empty((len(batch.token_ids), self._hidden.width), np.uint16)
        return _HeadScores(self._program, self._head, hidden, functools.partial(self._run, batch))

    def seconds(self) -> list[tuple[str, float]]:
        """Where steps spent their time, by operation in order, since the last `clear_seconds`."""
        return list(self._program.seconds())

    def clear_seconds(self) -> None:
        self._program.clear_seconds()


class NativeScores:
    """The `Scores` [N, V] that somebody else computed, chosen from natively, on one thread; they stay as they are."""

    def __init__(self, scores: Tensor, kernels: str) -> None:
        self._scores, self._kernels = scores.contiguous(), kernels

    def choose(self, params: RowParams, edits: RowEdits | None, reported: Ids) -> tuple[Ids, Tensor]:
        tokens = np.empty(len(self._scores), np.int64)
        asked = native_asked(params, edits, self._scores.shape[1])
        load_native().choose_from(self._kernels, self._scores.numpy(), asked, tokens)
        return tokens, self._scores[torch.from_numpy(reported)]


class _HeadScores:
    """The head and the choice in one native call: nobody holds all scores but for the rows that are reported.

    hidden: bf16 as uint16 [N, hidden]; `fill` writes it first.
    """

    def __init__(
        self, program: Any, head: Any, hidden: np.ndarray, fill: Callable[[np.ndarray], None] | None = None
    ) -> None:
        self._program, self._head, self._hidden, self._fill = program, head, hidden, fill

    def choose(self, params: RowParams, edits: RowEdits | None, reported: Ids) -> tuple[Ids, Tensor]:
        tokens = np.empty(len(self._hidden), np.int64)
        raw = torch.empty(len(reported), self._head.n)
        asked, scores = native_asked(params, edits, self._head.n), raw.numpy()
        if self._fill is not None:
            self._fill(self._hidden)
        self._program.choose(self._head, self._hidden, asked, reported, scores, tokens)
        return tokens, raw


def native_asked(params: RowParams, edits: RowEdits | None, vocab_size: int) -> Any:
    """`params` and `edits` as the native sampler reads them. Raises ValueError for ids outside the vocabulary."""
    native = load_native()
    asked = (params.temperature, params.top_k, params.top_p, params.min_p, params.seeds, params.positions)
    if edits is None:
        return native.Asked(*asked, None)
    e = edits
    constant = (e.biased.starts, e.biased.ids, e.bias, e.limited, e.allowed.starts, e.allowed.ids)
    changing = (e.banned.starts, e.banned.ids, e.occurred.starts, e.occurred.ids, e.counts, e.penalties)
    return native.Asked(*asked, native.Edits(vocab_size, *constant, *changing))


@dataclass(slots=True)
class NativeStep:
    """What the program must know of a step besides its tokens. There is nothing to run per layer."""

    query_start: np.ndarray  # int64 [R + 1]
    start: np.ndarray  # int64 [R]
    tables: list[np.ndarray]  # per KV group int32 [R, max_blocks]
    words: StepWords | None = None

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("a native program attends by itself")


class NativeAttention:
    """The AttentionBackend of native programs: hands the spans on."""

    def prepare(self, spans: Spans, words: StepWords | None = None) -> NativeStep:
        query_start, start = (values.astype(np.int64, copy=False) for values in (spans.query_start, spans.start))
        return NativeStep(query_start, start, [np.ascontiguousarray(t, np.int32) for t in spans.block_tables], words)


def check_layout(layout: KVLayout) -> None:
    """Raise Unsupported for a KV cache that native kernels cannot use."""
    block = load_native().KV_BLOCK
    for group in layout.groups:
        if group.dtype not in KV_FORMATS:
            raise Unsupported(f"native kernels need a KV cache of {' or '.join(KV_FORMATS)}, not {group.dtype}")
        if group.block_size != block:
            raise Unsupported(f"native kernels need blocks of {block} tokens, not {group.block_size}")
        if group.head_dim % COLUMNS or group.head_dim > 256:
            raise Unsupported(f"native kernels need heads of a multiple of 16 up to 256, not {group.head_dim}")


def packed_layout(layout: KVLayout) -> KVLayout:
    """The layout with the order of elements that native kernels write and read. Raises Unsupported as check_layout."""
    check_layout(layout)
    return KVLayout(tuple(replace(group, packing=KV_PACKING) for group in layout.groups))


@dataclass(frozen=True, slots=True)
class _Use:
    """How a parameter is packed. `interleaved`: halves of gate and up, in turns of one block each."""

    parameter: Tensor
    bias: Tensor | None
    format: str
    interleaved: bool


class _Planner:
    """A Recorder that notes how each projection is used, and refuses shapes that native kernels cannot compute."""

    def __init__(self, uses: dict[int, _Use], weight_format: str) -> None:
        self._uses = uses
        self._format = weight_format

    def embed(self, weight: Tensor) -> Buffer:
        return Buffer(0, weight.shape[1])

    def rms_norm(self, x: Buffer, weight: Tensor, eps: float) -> Buffer:
        return x

    def linear(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        self._uses[id(weight)] = _Use(weight, bias, self._format, False)
        return Buffer(0, weight.shape[0])

    def linear_add(self, x: Buffer, a: Buffer, weight: Tensor, bias: Tensor | None) -> None:
        assert tuple(weight.shape) == (x.width, a.width)
        self._uses[id(weight)] = _Use(weight, bias, self._format, False)

    def linear_silu_mul(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        width = weight.shape[0] // 2
        if width % COLUMNS:
            raise Unsupported(f"native kernels need a feed-forward width of a multiple of {COLUMNS}, not {width}")
        self._uses[id(weight)] = _Use(weight, bias, self._format, True)
        return Buffer(0, width)

    def attend(
        self,
        layer: int,
        qkv: Buffer,
        num_heads: int,
        norms: tuple[Tensor, Tensor, float] | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Buffer:
        return Buffer(0, num_heads * 2 * rotary[0].shape[1])


class _Recorder:
    """The Recorder of native programs. Buffers of one kind are shared by all layers."""

    def __init__(self, weights: PackedWeights, program: Any, layout: KVLayout, pools: Sequence[Tensor]) -> None:
        self._weights = weights
        self._program = program
        self._buffers: dict[tuple[str, int], Buffer] = {}
        self.kept: list[Any] = []
        self._pools: dict[int, tuple[int, int]] = {}  # layer -> (pool of the program, head size)
        for group in layout.groups:
            for layer in group.layers:
                flat = pools[layer].view(torch.uint8).view(pools[layer].shape[0], -1).numpy()
                shape = group.num_kv_heads, group.head_dim, group.index, group.window or 0
                number = program.pool(flat, *shape, KV_FORMATS[group.dtype], layer)
                self._pools[layer] = (number, group.head_dim)
                self.kept.append(flat)

    def embed(self, weight: Tensor) -> Buffer:
        packed = self._weights.find(weight)
        width = weight.shape[1] if packed is None else packed.k
        x = Buffer(self._program.buffer(F32, width), width)
        if packed is None:
            self.kept.append(weight)
            self._program.embed_bf16(_words(weight), x.number)
        else:  # the head's matrix: its rows are looked up in the packed form
            self._program.embed_packed(packed, x.number)
        return x

    def rms_norm(self, x: Buffer, weight: Tensor, eps: float) -> Buffer:
        to = self._buffer("norm", x.width)
        self._program.rms_norm(x.number, _floats(weight), eps, to.number)
        return to

    def linear(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        packed = self._weights.find(weight)
        assert packed is not None
        to = self._buffer("linear", packed.n)
        self._program.linear(packed, a.number, to.number)
        return to

    def linear_add(self, x: Buffer, a: Buffer, weight: Tensor, bias: Tensor | None) -> None:
        self._program.linear_add(self._weights.find(weight), a.number, x.number)

    def linear_silu_mul(self, a: Buffer, weight: Tensor, bias: Tensor | None) -> Buffer:
        packed = self._weights.find(weight)
        assert packed is not None
        to = self._buffer("gated", packed.n // 2)
        self._program.linear_silu_mul(packed, a.number, to.number)
        return to

    def attend(
        self,
        layer: int,
        qkv: Buffer,
        num_heads: int,
        norms: tuple[Tensor, Tensor, float] | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Buffer:
        pool, dim = self._pools[layer]
        q_norm, k_norm, eps = (None, None, 0.0) if norms is None else (_floats(norms[0]), _floats(norms[1]), norms[2])
        cos, sin = (table.numpy() for table in rotary)
        self.kept += rotary
        self._program.heads(qkv.number, num_heads, pool, q_norm, k_norm, eps, cos, sin)
        to = self._buffer("attention", num_heads * dim)
        self._program.attend(qkv.number, num_heads, pool, math.log2(math.e) / math.sqrt(dim), to.number)
        return to

    def _buffer(self, kind: str, width: int) -> Buffer:
        if (kind, width) not in self._buffers:
            self._buffers[kind, width] = Buffer(self._program.buffer(BF16, width), width)
        return self._buffers[kind, width]


def _interleaved(fused: Tensor) -> Tensor:
    """Rows of gate and up, in turns of one packed block each."""
    blocks = fused.detach().view(2, -1, COLUMNS, *fused.shape[1:])
    return blocks.transpose(0, 1).reshape(fused.shape)


def _words(tensor: Tensor) -> np.ndarray:
    """A bf16 tensor's memory as uint16."""
    return tensor.detach().view(torch.uint16).numpy()


def _floats(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()
