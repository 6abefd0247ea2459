"""The native CPU kernels: whether they are there, weights packed for them, and a recorded program as a model.

The modules of `nn.layers` and `nn.models` stay the specification: their `record` says once, in the order of `forward`,
which operations a step is made of; afterwards a step is one native call for all layers. Knows no model family and no
request. Weights are packed while recording and leave torch's memory one by one.

Exactness: a row's result does not depend on the batch, the chunking or the number of threads, bit for bit (E0); beside
plain torch it is E1.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import is_
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.config.model import KVLayout
from penstock.config.quantization import ROTATIONS
from penstock.nn.doors import Batch, Buffer, Recorder, Scores, Spans
from penstock.nn.kernels.edits import Ids, RowEdits, RowParams
from penstock.nn.kernels.native_recording import (
    COLUMNS,
    KV_FORMATS,
    Planner,
    ProgramRecorder,
    Unsupported,
    Use,
    floats,
    interleaved,
    words,
)
from penstock.nn.weights.quantized import QuantizedRows
from penstock.nn.words import StepWords

log = logging.getLogger("penstock.nn")
extension: ModuleType | None = None
why_missing = ""
try:
    import penstock._native as extension
except ImportError as missing:
    why_missing = str(missing)

FORMATS = {"bf16": 0, "int8": 1, "w8a8": 2, "int4": 3, "w4a8": 4, "bf12": 5}  # as native/src/kernels.hpp numbers them
KV_PACKING = "paired"  # as KVGroup names the order of both


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


@cache
def usable_kernels() -> tuple[str, ...]:
    """Names of the instruction sets that native kernels can use here, best first. Empty without the extension.

    Each is compared with the plainest on small products of every format and on tokens chosen from one (a millisecond):
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
    team = native.Team(1, [])
    plain, rotated = [(each, 0) for each in FORMATS.values()], [(FORMATS["w8a8"], block) for block in ROTATIONS]
    for weight_format, rotation in plain + rotated:
        values, rows = (torch.randn(n, 2 * rotation or 200, generator=draw).bfloat16() for n in (50, 37))
        weight = native.PackedWeight(weight_format, *values.shape, None, rotation)
        weight.fill(team, 0, words(values))
        results = torch.zeros(2, len(rows), len(values))
        for kernels, result in zip((name, plainest), results, strict=True):
            native.Program(kernels, team, len(rows)).head(weight, words(rows), result.numpy())
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
    bf16 and bf12 hold the same numbers (E0; sums of bf12 may round in another order); the others lose what rounding to
    their grid loses (E3).
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
        self._uses = {id(model.head.weight): Use(model.head.weight, model.head.bias, formats[1])}
        model.record(Planner(self._uses, formats[0]))
        self._packed: dict[int, Any] = {}
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.team = self._native.Team(num_threads, cpus if len(cpus) == num_threads else [])

    def wants(self, parameter: Tensor) -> bool:
        """Whether it is a projection, whose rows `put` takes from now on."""
        use = self._uses.get(id(parameter))
        if use is None or id(parameter) in self._packed:
            return False
        self._packed[id(parameter)] = self._empty(use.format, parameter, use.rotation)
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
            packed = self._empty(use.format, parameter, use.rotation)
            rows = interleaved(parameter) if use.interleaved else parameter.detach()
            packed.fill(self.team, 0, words(rows))
            self._packed[id(parameter)] = packed
            self._native.release(words(parameter))  # at once: a loader may hold views of this memory until its end
        parameter.data = torch.empty(0, dtype=parameter.dtype)

    def put_quantized(self, parameter: Tensor, start: int, rows: QuantizedRows) -> bool:
        """Pack rows [start, ...) of a projection that are quantized already, as they are (E0). False: it is none.

        All rows of a parameter come in one scheme, in any order.
        """
        use, native_format = self._uses.get(id(parameter)), rows.scheme.native
        if use is None or native_format is None:
            return False
        if id(parameter) not in self._packed:
            self._packed[id(parameter)] = self._empty(native_format, parameter, rows.scheme.rotation)
            parameter.data = torch.empty(0, dtype=parameter.dtype)  # never touched, so it takes no memory yet
        packed, step = self._packed[id(parameter)], 1
        if use.interleaved:
            assert start in (0, rows.shape[0])
            start, step = (COLUMNS if start else 0), 2
        fill = packed.fill_nibbles if rows.nibbles else packed.fill_quantized
        fill(self.team, start, step, rows.integers, rows.native_scales())
        return True

    def _empty(self, weight_format: str, parameter: Tensor, rotation: int) -> Any:
        return self._native.PackedWeight(FORMATS[weight_format], *parameter.shape, self._arena, rotation)

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
            packed.set_bias(floats(interleaved(use.bias) if use.interleaved else use.bias))
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
        recorder = ProgramRecorder(weights, self._program, layout, pools)
        head = weights.find(model.head.weight)
        assert head is not None
        self._head = head
        self._hidden = model.record(recorder)
        weights.finish()
        self._kept = recorder.kept  # memory that the program reads
        nothing = torch.empty(0, head.n)
        self._no_scores = nothing, nothing.numpy()
        self._tensors: tuple[Tensor | None, ...] = (None, None, None)  # of the last batch ...
        self._arrays: list[Any] = []  # ... and their memory
        self._params: RowParams | None = None  # for whom something was asked last, and what
        self._asked: Any = None

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states bf16 [N, hidden] of the batch's outputs after the last norm.

        Rows of other tokens end with the keys and values of the last layer.
        """
        arrays = self._memory(batch)
        self._perform(self._program.run, batch, arrays)
        hidden = torch.empty(_num_outputs(arrays), self._hidden.width, dtype=torch.bfloat16)
        self._program.read(self._hidden.number, words(hidden))
        return hidden

    def scores_after(self, batch: Batch) -> Scores:
        """Layers, head and choice are one native call: between two of them Python would run on empty caches."""
        arrays = self._memory(batch)
        choose = partial(self._perform, self._program.step, batch, arrays, self._hidden.number, self._head)
        return _HeadScores(self, _num_outputs(arrays), choose)

    def _memory(self, batch: Batch) -> list[Any]:
        """Token ids, positions and outputs as arrays. Steady decoding brings the same tensors again and again."""
        tensors = batch.token_ids, batch.positions, batch.outputs
        if not all(map(is_, tensors, self._tensors)):
            self._tensors = tensors
            self._arrays = [None if tensor is None else tensor.numpy() for tensor in tensors]
        return self._arrays

    def _perform(self, call: Callable[..., list[int]], batch: Batch, arrays: list[Any], *more: Any) -> None:
        """`call` of the program on a batch, with what else it takes."""
        step = batch.attention
        assert isinstance(step, NativeStep)
        token_ids, positions, outputs = arrays
        told = step.words
        shared = (0, (), 0.0) if told is None else (told.done, told.loads, told.patience_s)
        bad = call(token_ids, positions, step.query_start, step.start, step.tables, outputs, *shared, *more)
        if told is not None:
            told.went_on_without(bad)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden bf16 [N, hidden] to float32 [N, vocab_size]."""
        scores = torch.empty(hidden.shape[0], self._head.n)
        self._program.head(self._head, words(hidden.contiguous()), scores.numpy())
        return scores

    def scores(self, hidden: Tensor) -> Scores:
        choose = partial(self._program.choose, self._head, words(hidden.contiguous()))
        return _HeadScores(self, hidden.shape[0], choose)

    def raw_scores(self, num_rows: int) -> tuple[Tensor, np.ndarray]:
        """Room for the scores of so many rows, float32 [num_rows, vocab_size], and its memory."""
        if num_rows == 0:
            return self._no_scores
        raw = torch.empty(num_rows, self._head.n)
        return raw, raw.numpy()

    def asked(self, params: RowParams, edits: RowEdits | None) -> Any:
        """As `native_asked`. Without edits it is made once for `params`: it sees the memory of their arrays."""
        if edits is not None:
            return native_asked(params, edits, self._head.n)
        if params is not self._params:
            self._params, self._asked = params, native_asked(params, None, self._head.n)
        return self._asked

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
    """N rows' head and choice in one native call: nobody holds all scores but for the rows that are reported.

    `choose` makes that call: with what is asked, the rows to report, where their scores and where the tokens go.
    """

    def __init__(self, model: NativeModel, num_rows: int, choose: Callable[[Any, Ids, np.ndarray, Ids], None]) -> None:
        self._model, self._num_rows, self._choose = model, num_rows, choose

    def choose(self, params: RowParams, edits: RowEdits | None, reported: Ids) -> tuple[Ids, Tensor]:
        tokens = np.empty(self._num_rows, np.int64)
        raw, memory = self._model.raw_scores(len(reported))
        self._choose(self._model.asked(params, edits), reported, memory, tokens)
        return tokens, raw


def _num_outputs(arrays: list[Any]) -> int:
    token_ids, _, outputs = arrays
    return len(token_ids if outputs is None else outputs)


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
        return NativeStep(spans.query_start, spans.start, list(spans.block_tables), words)


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
