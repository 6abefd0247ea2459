"""Native attention driven alone: rows of a table are queries, keys and values, and are not rotated.

Knows blocks and requests by their numbers; knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from penstock.config.model import KVGroup, KVLayout
from penstock.nn.kernels.native import load_native, packed_layout
from penstock.nn.kernels.native_recording import BF16, F32, KV_FORMATS
from penstock.runner.kv_store import KVStore

SIZE = 32  # tokens of a block
REQUESTS = 3


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def paired(numbers: torch.Tensor, part: str) -> torch.Tensor:
    """[32, D] in the order that KVGroup calls paired."""
    dim = numbers.shape[1]
    if part == "k":
        return numbers.view(2, 16, dim // 2, 2).transpose(1, 2).reshape(-1)
    return numbers.view(16, 2, dim // 16, 16).permute(2, 0, 3, 1).reshape(-1)


def drawn(heads: int, group: int, dim: int, seed: int, most: int) -> torch.Tensor:
    """A table of requests of up to `most` tokens. Keys and values have outliers, as those of real models do."""
    num = REQUESTS * most
    table = torch.randn(num, (2 + group) * heads * dim, generator=torch.Generator().manual_seed(seed))
    table[:, group * heads * dim :: 37] *= 8
    return table.bfloat16()


def blocks_of(request: int, num_tokens: int) -> list[int]:
    """Requests own every third block of the pool."""
    return [1 + request + REQUESTS * block for block in range(-(-num_tokens // SIZE))]


class Native:
    """Native attention of three requests: of each a third of the rows of `table`, [3 * most, (Hq + 2 Hkv) * D]."""

    def __init__(
        self, table: torch.Tensor, kernels: str, heads: int, group: int, dim: int,
        window: int | None = None, num_threads: int = 1, dtype: str = "int8",
    ) -> None:  # fmt: skip
        native = load_native()
        self.heads, self.group, self.dim, self.most = heads, group, dim, len(table) // REQUESTS
        kind = "full" if window is None else "window"
        self.layout = packed_layout(KVLayout((KVGroup(0, kind, (0,), window, SIZE, heads, dim, dtype),)))
        num_blocks = 1 + REQUESTS * -(-self.most // SIZE)
        self.store = KVStore(self.layout, (num_blocks,), torch.device("cpu"))
        width = table.shape[1]
        self.program = native.Program(kernels, native.Team(num_threads, []), len(table))
        x, self.qkv = self.program.buffer(F32, width), self.program.buffer(BF16, width)
        self.out = self.program.buffer(BF16, heads * group * dim)
        flat = self.store.pools[0].view(torch.uint8).view(num_blocks, -1).numpy()
        pool = self.program.pool(flat, heads, dim, 0, window or 0, KV_FORMATS[dtype])
        still = np.ones((self.most, dim // 2), np.float32)
        self.program.embed_bf16(table.view(torch.uint16).numpy(), x)
        self.program.rms_norm(x, np.ones(width, np.float32), 1e-6, self.qkv)
        self.program.heads(self.qkv, heads * group, pool, None, None, 0.0, still, np.zeros_like(still))
        self.program.attend(self.qkv, heads * group, pool, math.log2(math.e) / math.sqrt(dim), self.out)
        self.kept = table, flat, still

    def step(
        self, rows: Sequence[tuple[int, int, int]], outputs: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows are (request, start, number of tokens). (qkv of all tokens, results of all or of the outputs)."""
        starts = np.array([start for _, start, _ in rows], np.int64)
        nums = np.array([num for *_, num in rows], np.int64)
        width = len(blocks_of(0, max((starts + nums).tolist(), default=0)))
        table = np.array([blocks_of(request, SIZE * width) for request, *_ in rows], np.int32).reshape(len(rows), width)
        positions = np.concatenate([starts[:0], *(np.arange(start, start + num) for _, start, num in rows)])
        tokens = np.repeat(np.array([request * self.most for request, *_ in rows], np.int64), nums) + positions
        wanted = None if outputs is None else np.array(outputs, np.int64)
        self.program.run(tokens, positions, np.cumsum([0, *nums]), starts, [table], wanted)
        return self.read(len(tokens), len(tokens) if outputs is None else len(outputs))

    def read(self, num_tokens: int, num_results: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first so many rows of both buffers hold."""
        qkv = torch.empty(num_tokens, (2 + self.group) * self.heads * self.dim, dtype=torch.bfloat16)
        out = torch.empty(num_results, self.group * self.heads * self.dim, dtype=torch.bfloat16)
        self.program.read(self.qkv, qkv.view(torch.uint16).numpy())
        self.program.read(self.out, out.view(torch.uint16).numpy())
        return qkv, out

    def parts(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D]."""
        heads = qkv.view(len(qkv), -1, self.dim)
        return heads.split((self.heads * self.group, self.heads, self.heads), 1)  # type: ignore[return-value]
