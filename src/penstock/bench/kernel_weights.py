"""Kernels that read packed weights, as `penstock bench kernels` measures them: products, the head, its choice, lookups.

Weights are read in turns, as those of a model's layers, until caches hold none of them: they come from memory. Bytes of
products are those of the weights; inputs and results lie in caches. Knows shapes and formats of weights, no KV cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from penstock.bench.kernel_ceilings import Bench, Work, run_tokens
from penstock.build.engine import QUANTIZATION
from penstock.config.model import ModelConfig
from penstock.nn.kernels.edits import NO_IDS, RowParams
from penstock.nn.kernels.native import FORMATS, native_asked
from penstock.nn.kernels.native_recording import BF16, F32, words

BITS = {"bf16": 16, "int8": 8, "w8a8": 8, "int4": 4.25, "w4a8": 4.25, "bf12": 12}
HEAD_FORMATS = dict(QUANTIZATION.values())  # of the head, by those of the layers
LOOKUPS = 64  # of an embedding in one round, at least
FILLED_ROWS = 4096  # of random weights; beyond them their columns are moved
SPREAD = 3.0  # standard deviation of scores
CHOICES = {"greedy": (0.0, 0, 1.0), "top-k/p": (0.8, 50, 0.9)}  # temperature, top_k, top_p
KINDS = {"linear": "", "linear_add": " add", "linear_silu_mul": " silu"}  # operations as they are printed

Shape = tuple[int, int]  # outputs, inputs


def shapes(config: ModelConfig) -> list[Shape]:
    """(outputs, inputs) of the projections of a layer."""
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    hidden, inter = config.hidden_size, config.intermediate_size
    return list(dict.fromkeys(((qkv, hidden), (hidden, heads), (2 * inter, hidden), (hidden, inter))))


def fused(config: ModelConfig) -> list[tuple[str, Shape]]:
    """(operation, shape) of the products of a layer that do more than round their result."""
    hidden, inter = config.hidden_size, config.intermediate_size
    add, silu = "linear_add", "linear_silu_mul"
    found = (add, (hidden, config.num_heads * config.head_dim)), (silu, (2 * inter, hidden)), (add, (hidden, inter))
    return list(dict.fromkeys(found))


def packed(bench: Bench, name: str, num_out: int, num_in: int, values: np.ndarray) -> Any:
    """A weight of random `values`, bf16 as uint16 [up to num_out, num_in]."""
    weight = bench.native.PackedWeight(FORMATS[name], num_out, num_in)
    for at in range(0, num_out, len(values)):
        weight.fill(bench.team, at, np.roll(values[: num_out - at], at // len(values), axis=1) if at else values)
    return weight


def random_words(rows: int, width: int, spread: float = 1.0) -> np.ndarray:
    return words((spread * torch.randn(rows, width)).bfloat16())


class Products:
    """Products of a layer in one format: of layers in turns, each time with other weights.

    `linear` rounds its result to bf16. `add` adds it to the float32 residual stream, `silu` multiplies the halves of
    gate and up: what they do besides multiplying is in their time. Quantization of inputs is not: it has a row.
    """

    def __init__(self, bench: Bench, config: ModelConfig, name: str) -> None:
        self._bench, self._name = bench, name
        self._plain = [("linear", shape) for shape in shapes(config)]
        self._fused = fused(config)
        self._layers = bench.turns(sum(self._bytes(shape) for _, shape in self._fused))
        values = {shape: random_words(*shape) for _, shape in self._plain}
        self._weights = {s: [packed(bench, name, *s, v) for _ in range(self._layers)] for s, v in values.items()}

    def rows(self, counts: list[int]) -> list[dict[str, Any]]:
        """Figures by operation and shape, then by rows of the inputs."""
        found = []
        for operations in (self._plain, self._fused):
            by_count = [self._measure(operations, count) for count in counts]
            found += [of_count[i] for i in range(len(operations)) for of_count in by_count]
        return found

    def _measure(self, operations: list[tuple[str, Shape]], count: int) -> list[dict[str, Any]]:
        works = [self._work(operation, shape, count) for operation, shape in operations]
        layer_bytes = sum(work.num_bytes for work in works)
        turns = self._bench.used(self._layers, layer_bytes, sum(work.operations for work in works), self._name)
        program = self._bench.program(count)
        buffers: dict[tuple[str, int], int] = {}
        for turn in range(turns):
            for operation, shape in operations:
                self._record(program, buffers, operation, self._weights[shape][turn])
        tokens = np.zeros(count, np.int64)
        run = partial(run_tokens, program, tokens)
        seconds = self._bench.seconds(program, tuple(KINDS), run, len(operations))
        streamed = turns * layer_bytes
        return [self._bench.row(replace(w, streamed=streamed), s) for w, s in zip(works, seconds, strict=True)]

    def _record(self, program: Any, buffers: dict[tuple[str, int], int], operation: str, weight: Any) -> None:
        source, to = ("source", weight.k), (operation, weight.n // 2 if operation == "linear_silu_mul" else weight.n)
        for key in (source, to):
            if key not in buffers:
                buffers[key] = program.buffer(F32 if key[0] == "linear_add" else BF16, key[1])
        getattr(program, operation)(weight, buffers[source], buffers[to])

    def _work(self, operation: str, shape: Shape, count: int) -> Work:
        num_out, num_in = shape
        kernel = self._name + KINDS[operation]
        operations = 2.0 * num_out * num_in * count
        return Work(kernel, f"{num_out} x {num_in}", count, self._bytes(shape), 0.0, operations, self._name)

    def _bytes(self, shape: Shape) -> float:
        return shape[0] * shape[1] * BITS[self._name] / 8


class Heads:
    """The head in one format, several in turns: scores, the choice of tokens in the same call, rows as embeddings.

    Formats that quantize inputs do it in the head's call, and it is in its time.
    """

    def __init__(self, bench: Bench, config: ModelConfig, name: str) -> None:
        self._bench, self._name = bench, name
        self._shape = config.vocab_size, config.hidden_size
        self._bytes = config.vocab_size * config.hidden_size * BITS[name] / 8
        values = random_words(min(FILLED_ROWS, config.vocab_size), config.hidden_size)
        self._weights = [packed(bench, name, *self._shape, values) for _ in range(bench.turns(self._bytes))]

    def lookup(self, count: int) -> dict[str, Any]:
        """Embeddings of `count` tokens out of the packed head, as tied ones are: a 16th of the lines they touch."""
        program = self._bench.program(count)
        to = program.buffer(F32, self._shape[1])
        for weight in self._weights:
            program.embed_packed(weight, to)
        of_table = self._bytes / self._shape[0]
        return lookup(self._bench, program, f"embed packed {self._name}", self._shape, count, of_table)

    def scores(self, count: int) -> dict[str, Any]:
        """Scores of `count` rows, float32, into memory: what log probabilities are made of."""
        program, hidden = self._bench.program(count), self._hidden(count)
        out = np.zeros((count, self._shape[0]), np.float32)
        work, weights = self._work("", count)

        def seconds() -> float:
            start = time.perf_counter()
            for weight in weights:
                program.head(weight, hidden, out)
            return (time.perf_counter() - start) / len(weights)

        seconds()
        return self._bench.row(work, median(seconds() for _ in range(self._bench.rounds)))

    def choices(self, count: int) -> Iterator[dict[str, Any]]:
        """Tokens chosen for `count` rows, all alike, for each of CHOICES."""
        hidden, tokens = self._hidden(count), np.empty(count, np.int64)
        nothing = np.empty((0, self._shape[0]), np.float32)
        at = np.arange(count)
        for kind, (temperature, top_k, top_p) in CHOICES.items():
            filters = np.full(count, temperature, np.float32), np.full(count, top_k), np.full(count, top_p)
            asked = native_asked(RowParams(*filters, np.zeros(count), at.astype(np.uint64), at), None, self._shape[0])
            program = self._bench.program(count)
            work, weights = self._work(f" {kind}", count)
            yield self._bench.row(work, self._choose(program, weights, hidden, asked, nothing, tokens))

    def _choose(
        self, program: Any, weights: list[Any], hidden: np.ndarray, asked: Any, nothing: np.ndarray, tokens: np.ndarray
    ) -> float:
        def run() -> None:
            for weight in weights:
                program.choose(weight, hidden, asked, NO_IDS, nothing, tokens)

        return self._bench.seconds(program, ("head and choice",), run)[0] / len(weights)

    def _work(self, kind: str, count: int) -> tuple[Work, list[Any]]:
        num_out, num_in = self._shape
        operations = 2.0 * num_out * num_in * count
        turns = self._bench.used(len(self._weights), self._bytes, operations, self._name)
        shape, streamed = f"{num_out} x {num_in}", turns * self._bytes
        work = Work(f"head {self._name}{kind}", shape, count, self._bytes, streamed, operations, self._name)
        return work, self._weights[:turns]

    def _hidden(self, count: int) -> np.ndarray:
        return random_words(count, self._shape[1], SPREAD / self._shape[1] ** 0.5)


def lookup_plain(bench: Bench, config: ModelConfig, count: int) -> dict[str, Any]:
    """Embeddings of `count` tokens out of a bf16 table of their own, where they are not tied to the head."""
    shape = config.vocab_size, config.hidden_size
    tables = np.tile(random_words(1, shape[1]), (bench.turns(2 * shape[0] * shape[1]) * shape[0], 1))
    program = bench.program(count)
    to = program.buffer(F32, shape[1])
    for at in range(0, len(tables), shape[0]):
        program.embed_bf16(tables[at : at + shape[0]], to)
    return lookup(bench, program, "embed", shape, count, 2.0 * shape[1])


def lookup(bench: Bench, program: Any, kernel: str, shape: Shape, count: int, row_bytes: float) -> dict[str, Any]:
    """The embeddings that `program` is made of, out of tables that no cache holds, with other tokens each time."""
    num_tables = len(program.seconds()) - 1
    runs = -(-LOOKUPS // num_tables)
    draw = np.random.default_rng(0)

    def run() -> None:
        for _ in range(runs):
            run_tokens(program, draw.integers(0, shape[0], count))

    seconds = bench.seconds(program, ("embed",), run)[0] / runs
    table_bytes = row_bytes * shape[0] * num_tables
    return bench.row(Work(kernel, f"{shape[0]} x {shape[1]}", count, count * row_bytes, table_bytes), seconds)
