"""Kernels that work token by token, as `penstock bench kernels` measures them: norm, quantization, heads, attention.

Norm and quantization work on rows that the kernel before has just written: where these lie in caches, memory is not
their bound. Heads and attention write and read KV pools of layers in turns, until caches hold none of them. Knows
no weights of a model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from penstock.bench.kernel_ceilings import STREAMED_BYTES, Bench, Work, run_tokens
from penstock.config.model import KVGroup, KVLayout, ModelConfig
from penstock.nn.kernels.native import FORMATS
from penstock.nn.kernels.native_recording import BF16, F32, KV_FORMATS
from penstock.nn.quant.rotation import largest_rotation
from penstock.runner.kv_store import KVStore

BLOCK = 32
REPEATED = 64  # calls of a kernel that works in caches, one behind the other
WRITTEN_AT = BLOCK // 2 + 1  # where a decoding row writes: in the middle of a block


def norm(bench: Bench, config: ModelConfig, count: int) -> dict[str, Any]:
    """RMSNorm of float32 residual rows to bf16. It adds nothing: the product before it has added to the residual."""
    width = config.hidden_size
    program = bench.program(count)
    residual, to = program.buffer(F32, width), program.buffer(BF16, width)
    for _ in range(REPEATED):
        program.rms_norm(residual, np.ones(width, np.float32), config.norm_eps, to)
    tokens = np.zeros(count, np.int64)
    seconds = bench.seconds(program, ("norm",), partial(run_tokens, program, tokens))[0]
    num_bytes = 6.0 * width * count
    return bench.row(Work("norm", f"{width}", count, num_bytes, num_bytes), seconds)


def quantized_widths(config: ModelConfig) -> list[tuple[int, int]]:
    """(width, block that is rotated) of the inputs of a layer's products, where these are rounded to 8 bits."""
    inter = config.intermediate_size
    plain = dict.fromkeys((config.hidden_size, config.num_heads * config.head_dim))
    return [*((width, 0) for width in plain), (inter, largest_rotation(inter))]


def quantize(bench: Bench, width: int, rotation: int, count: int) -> dict[str, Any]:
    """Rows of bf16 to int8, a scale each and sums of 128, after Hadamard rotation where the product wants that."""
    program = bench.program(count)
    sources, to = [program.buffer(BF16, width) for _ in range(2)], program.buffer(BF16, 16)
    weight = bench.native.PackedWeight(FORMATS["w8a8"], 16, width, None, rotation)
    weight.fill(bench.team, 0, np.zeros((16, width), np.uint16))
    for i in range(REPEATED):  # in turns: a second product would take what the first one quantized
        program.linear(weight, sources[i % 2], to)
    tokens = np.zeros(count, np.int64)
    seconds = bench.seconds(program, ("quantize",), partial(run_tokens, program, tokens))[0]
    num_bytes = 3.0 * width * count
    kernel, shape = ("rotate + quantize", f"{width} by {rotation}") if rotation else ("quantize", f"{width}")
    return bench.row(Work(kernel, shape, count, num_bytes, 2 * num_bytes), seconds)


class Caches:
    """KV pools in one dtype: memory of many layers, of `sizes` blocks of which a layer may have."""

    def __init__(self, bench: Bench, config: ModelConfig, dtype: str, sizes: list[int]) -> None:
        self._bench, self._config, self._dtype = bench, config, dtype
        group = kv_group(config, dtype)
        self._block_bytes = group.layer_bytes
        num_blocks = max(blocks * self._layers(blocks) for blocks in sizes)
        self._store = KVStore(KVLayout((group,)), (num_blocks,), torch.device("cpu"))
        self._bytes = self._store.pools[0].view(torch.uint8).view(-1, self._block_bytes)
        self._bytes.zero_()  # untouched memory would be read from one page

    def attention(self, batch: int, context: int) -> dict[str, Any]:
        """One layer's attention of `batch` decoding rows, each with `context` tokens of its own."""
        heads, kv_heads, dim = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        blocks = -(-context // BLOCK)
        program = self._bench.program(batch)
        qkv, to = program.buffer(BF16, self._qkv_width()), program.buffer(BF16, heads * dim)
        memory = self._bytes.numpy()
        for layer in range(self._layers(batch * blocks)):
            of_layer = memory[layer * batch * blocks :][: batch * blocks]
            pool = program.pool(of_layer, kv_heads, dim, 0, 0, KV_FORMATS[self._dtype])
            program.attend(qkv, heads, pool, 1.0, to)
        table = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        positions = np.full(batch, context - 1)
        spans = np.arange(batch + 1), positions
        tokens = np.zeros(batch, np.int64)
        run = partial(program.run, tokens, positions, *spans, [table])
        seconds = self._bench.seconds(program, ("attend",), run)[0]
        shape = f"{heads}/{kv_heads} x {dim}, {context}"
        num_bytes = batch * context * self._block_bytes / BLOCK
        operations = 4.0 * batch * context * heads * dim
        return self._bench.row(self._work("attention", shape, batch, num_bytes, batch * blocks, operations), seconds)

    def decoding(self, batch: int) -> dict[str, Any]:
        """As `prompt`, of `batch` decoding rows: one token each, whose keys are a little of every line they touch."""
        positions = np.full(batch, WRITTEN_AT)
        return self._heads("decoding", positions, np.arange(batch + 1), positions, 1)

    def prompt(self, count: int) -> dict[str, Any]:
        """Norm of q and k where the model has it, rotary embedding in place, k and v into the pool: of one prompt.

        Bytes: keys and values, written as the pool has them; q, k and v lie in caches.
        """
        return self._heads("prompt", np.arange(count), np.array([0, count]), np.array([0]), -(-count // BLOCK))

    def _heads(
        self, kind: str, positions: np.ndarray, query_start: np.ndarray, start: np.ndarray, width: int
    ) -> dict[str, Any]:
        heads, kv_heads, dim = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        count = len(positions)
        program = self._bench.program(count)
        qkv = program.buffer(BF16, self._qkv_width())
        angles = np.full((int(positions.max()) + 1, dim // 2), 0.5, np.float32)
        gains = np.ones(dim, np.float32) if self._config.qk_norm else None
        blocks = len(start) * width
        layers, memory = self._layers(blocks), self._bytes.numpy()
        for layer in range(layers):  # a table each: a program looks through all memory that it was given
            pool = program.pool(memory, kv_heads, dim, layer, 0, KV_FORMATS[self._dtype])
            program.heads(qkv, heads, pool, gains, gains, self._config.norm_eps, angles, angles)
        tables = list(np.arange(layers * blocks, dtype=np.int32).reshape(layers, len(start), width))
        run = partial(program.run, np.zeros(count, np.int64), positions, query_start, start, tables)
        seconds = self._bench.seconds(program, ("heads",), run)[0]
        num_bytes = count * self._block_bytes / BLOCK
        shape = f"{heads}/{kv_heads} x {dim}, {kind}"
        return self._bench.row(self._work("heads", shape, count, num_bytes, blocks), seconds)

    def _work(
        self, kernel: str, shape: str, count: int, num_bytes: float, blocks: int, operations: float = 0.0
    ) -> Work:
        streamed = self._layers(blocks) * blocks * self._block_bytes
        return Work(f"{kernel} {self._dtype}", shape, count, num_bytes, streamed, operations)

    def _layers(self, blocks: int) -> int:
        return max(2, self._bench.turns(blocks * self._block_bytes))

    def _qkv_width(self) -> int:
        return (self._config.num_heads + 2 * self._config.num_kv_heads) * self._config.head_dim


def kv_group(config: ModelConfig, dtype: str) -> KVGroup:
    return KVGroup(0, "full", (0,), None, BLOCK, config.num_kv_heads, config.head_dim, dtype)


def pool_bytes(config: ModelConfig, dtype: str, blocks: int) -> int:
    """At most what `Caches` takes for layers of so many blocks."""
    of_layer = blocks * kv_group(config, dtype).layer_bytes
    return max(2 * of_layer, STREAMED_BYTES + of_layer)
