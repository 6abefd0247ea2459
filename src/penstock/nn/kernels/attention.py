"""Attention over a paged, head-major KV cache, for ragged batches that mix prompts and decodes. Plain torch.

Knows blocks, windows and spans; knows no request. Pool of one layer: [num_blocks, 2, Hkv, block_size, D], K then V; in
int8 [num_blocks, 2, Hkv, bytes], its bytes being a head's numbers [block_size, D] and then bf16 scales [block_size].
Exactness: E1 across batch mixes and chunkings, because torch's matrix product depends on the shape of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from penstock.config.model import KVGroup, KVLayout
from penstock.nn.doors import PreparedAttention, Spans
from penstock.nn.words import StepWords

LEAST_SCALE = 2.0**-100  # of int8 keys and values: its inverse is still a number
MAX_SCORES = 1 << 24  # query x key scores in one call: bounds the memory of masks


def attention_reference(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
    """Causal attention of one request in float32, query by query.

    Shapes: q [n, Hq, D] at positions start .. start + n; k, v [start + n, Hkv, D]; result [n, Hq, D], dtype of q.
    A query at position p sees keys (p - window, p], all up to p when window is None.
    Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1)
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        first = 0 if window is None else max(0, start + i - window + 1)
        keys, values = k[first : start + i + 1], v[first : start + i + 1]
        scores = torch.einsum("hd,khd->hk", q[i].float(), keys) / math.sqrt(q.shape[-1])
        out[i] = torch.einsum("hk,khd->hd", scores.softmax(-1), values).to(q.dtype)
    return out


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and their scale: `x` is about numbers * scale. E3: off by at most half a scale, absmax / 254.

    Shapes: x [..., D]; numbers int8 [..., D] in [-127, 127], to nearest, ties to even; scale bf16 [...], absmax / 127
    up to the next bf16, so that nothing is cut off. A head that holds a NaN or an infinity gets zeros and a NaN.
    """
    top = x.abs().amax(-1).float()
    exact = (top / 127).clamp(min=LEAST_SCALE)
    scale = ((exact.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
    numbers = (x.float() * (1 / scale).unsqueeze(-1)).round()
    is_number = top.isfinite()
    numbers = torch.where(is_number.unsqueeze(-1), numbers, 0)
    return numbers.to(torch.int8), torch.where(is_number, scale, math.nan).bfloat16()


def dequantize_heads(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """numbers int8 [..., D] and scale bf16 [...] to [..., D]; exact in float32, rounded once in a narrower dtype."""
    return numbers.to(dtype) * scale.to(dtype).unsqueeze(-1)


@dataclass(slots=True)
class _Call:
    """Rows with equally many tokens and about equal context, computed together: n rows of m tokens.

    tokens: where they stand in the batch. key_rows: rows of the pool seen as [num_blocks * 2 * Hkv, block_size * D]
    that hold K, without scales; those of V follow Hkv further on. None: nothing is cached, keys are the batch's own.
    mask: additive, [n or 1, 1, m (x group), L]; None: causal (no cache) or everything visible.
    """

    tokens: Tensor | slice
    n: int
    m: int
    key_rows: Tensor | None
    mask: Tensor | None


class PagedAttention:
    """The AttentionBackend of plain torch. `pools`: one tensor per layer, zero-filled before first use.

    `dtype`: of queries and results; the pools may be narrower, then keys and values are rounded on their way in.
    """

    def __init__(self, layout: KVLayout, pools: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.layout = layout
        self.pools = pools
        self.dtype = dtype
        self._group_of = {layer: g for g, group in enumerate(layout.groups) for layer in group.layers}

    def prepare(self, spans: Spans, words: StepWords | None = None) -> PreparedAttention:
        """Index tensors and masks of one step, shared by the layers of a group."""
        groups = [_GroupStep(group, spans, g, self.dtype) for g, group in enumerate(self.layout.groups)]
        return _Step(self, groups, words)


class _GroupStep:
    """What one KV group's layers share in one step."""

    def __init__(self, group: KVGroup, spans: Spans, index: int, dtype: torch.dtype) -> None:
        self.group = group
        self.dtype = dtype
        table = spans.block_tables[index]
        first = spans.query_start[:-1].astype(np.int64)
        num = np.diff(spans.query_start).astype(np.int64)
        start = spans.start.astype(np.int64)
        self.write_rows = self._write_rows(table, num, start)
        self.begun_blocks = self._begun_blocks(table, start, start + num)
        self.calls = [self._call(table, rows, first, num, start, fresh) for rows, fresh in self._together(num, start)]

    def _write_rows(self, table: np.ndarray, num: np.ndarray, start: np.ndarray) -> Tensor:
        """Rows of the pool seen as [num_blocks * 2 * Hkv * block_size, D] that take K, [T * Hkv]."""
        size, heads = self.group.block_size, self.group.num_kv_heads
        row = np.repeat(np.arange(len(num)), num)
        position = np.arange(len(row)) - np.repeat(np.cumsum(num) - num, num) + np.repeat(start, num)
        block = table[row, position // size].astype(np.int64)
        rows = ((block * 2 * heads)[:, None] + np.arange(heads)) * size + (position % size)[:, None]
        return torch.from_numpy(rows.reshape(-1))

    def _begun_blocks(self, table: np.ndarray, start: np.ndarray, end: np.ndarray) -> Tensor | None:
        """Blocks that get their first tokens and are not filled. Whoever had them may have left a NaN behind, which
        even a masked key or a value times zero would pass on."""
        size = self.group.block_size
        rows = np.flatnonzero((end % size != 0) & (end // size * size >= start))
        return torch.from_numpy(table[rows, end[rows] // size].astype(np.int64)) if len(rows) else None

    def _together(self, num: np.ndarray, start: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """Rows in sets that one call computes: (row indices, nothing cached)."""
        size = self.group.block_size
        blocks = -(-(start + num) // size)
        # Four buckets an octave of context: at most 25 % of the gathered keys are padding.
        shift = np.maximum(np.ceil(np.log2(np.maximum(blocks, 1))) - 2, 0).astype(np.int64)
        bucket = -(-blocks >> shift) << shift
        fresh = start == 0
        keys = np.stack((num, np.where(fresh, 0, bucket), fresh), 1)
        if (keys == keys[0]).all():
            sets = [np.arange(len(num))]
        else:
            _, inverse = np.unique(keys, axis=0, return_inverse=True)
            inverse = inverse.reshape(-1)
            sets = [np.flatnonzero(inverse == i) for i in range(int(inverse.max()) + 1)]
        out = []
        for rows in sets:
            one = int(num[rows[0]]) * int((start[rows] + num[rows]).max())
            each = max(1, MAX_SCORES // max(one, 1))
            out += [(rows[i : i + each], bool(fresh[rows[0]])) for i in range(0, len(rows), each)]
        return out

    def _call(
        self, table: np.ndarray, rows: np.ndarray, first: np.ndarray, num: np.ndarray, start: np.ndarray, fresh: bool
    ) -> _Call:
        n, m = len(rows), int(num[rows[0]])
        begin = first[rows]
        tokens: Tensor | slice
        if n == 1 or (np.diff(begin) == m).all():
            tokens = slice(int(begin[0]), int(begin[0]) + n * m)
        else:
            tokens = torch.from_numpy((begin[:, None] + np.arange(m)).reshape(-1))
        window = self.group.window
        if fresh:
            mask = None
            if window is not None and m > window:
                mask = self._mask(np.zeros(1, np.int64), np.zeros(1, np.int64), m, m)
            return _Call(tokens, n, m, None, mask)
        size, heads = self.group.block_size, self.group.num_kv_heads
        begins = start[rows]
        skip = np.zeros(n, np.int64) if window is None else np.maximum(0, begins - window + 1) // size
        length = int((-(-(begins + m) // size) - skip).max())
        columns = np.minimum(skip[:, None] + np.arange(length), table.shape[1] - 1)
        blocks = table[rows[:, None], columns].astype(np.int64)
        key_rows = (blocks * 2 * heads)[:, None, :] + np.arange(heads)[None, :, None]
        mask = self._mask(begins, skip * size, m, length * size)
        return _Call(tokens, n, m, torch.from_numpy(key_rows.reshape(-1)), mask)

    def _mask(self, begins: np.ndarray, key_begins: np.ndarray, m: int, length: int) -> Tensor | None:
        """0 where query begins[i] + j sees key key_begins[i] + l, -inf elsewhere: [n, 1, m, length]; None if all do."""
        query = torch.from_numpy(begins)[:, None, None] + torch.arange(m)[None, :, None]
        key = torch.from_numpy(key_begins)[:, None, None] + torch.arange(length)[None, None, :]
        visible = key <= query
        if self.group.window is not None:
            visible &= key > query - self.group.window
        if bool(visible.all()):
            return None
        return torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, -math.inf).unsqueeze(1)


class _Pages:
    """The pool of one layer, head by head: page p holds [size, dim], keys or values of one head in one block."""

    def __init__(self, pool: Tensor, size: int, dim: int) -> None:
        self._pages = pool.view(pool.shape[0] * 2 * pool.shape[2], -1)
        self._numbers = self._pages[:, : size * dim].unflatten(1, (size, dim))
        self._scales = self._pages[:, size * dim :].view(torch.bfloat16) if pool.dtype == torch.int8 else None

    def write(self, rows: Tensor, x: Tensor) -> Tensor:
        """Store x [T, Hkv, dim] in rows [T * Hkv], counted as page * size + slot. Result: what reads will give."""
        size, dim = self._numbers.shape[1:]
        if self._scales is None:
            narrow = x.to(self._pages.dtype)
            self._pages.view(-1, dim).index_copy_(0, rows, narrow.reshape(-1, dim))
            return narrow.to(x.dtype)
        numbers, scales = quantize_heads(x)
        places = rows // size, rows % size
        self._numbers[places], self._scales[places] = numbers.view(-1, dim), scales.view(-1)
        return dequantize_heads(numbers, scales, x.dtype)

    def read(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """[pages, size, dim]."""
        if self._scales is None:
            return self._pages.index_select(0, pages).to(dtype)
        numbers, scales = self._numbers.index_select(0, pages), self._scales.index_select(0, pages)
        return dequantize_heads(numbers, scales, dtype)


class _Step:
    """One step's attention, run once per layer."""

    def __init__(self, backend: PagedAttention, groups: list[_GroupStep], words: StepWords | None) -> None:
        self._backend = backend
        self._groups = groups
        self._words = words

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] of the backend's dtype; writes k, v, then attends. Result [T, Hq * D]."""
        step = self._groups[self._backend._group_of[layer]]
        pool = self._backend.pools[layer]
        heads, size = k.shape[1], step.group.block_size
        pages = _Pages(pool, size, k.shape[2])
        if step.begun_blocks is not None:
            pool.index_fill_(0, step.begun_blocks, 0)
        k = pages.write(step.write_rows, k)
        v = pages.write(step.write_rows + heads * size, v)
        if self._words is not None:
            self._words.written(layer)
            self._words.wait(layer)
        if len(step.calls) == 1:
            return self._attend(step.calls[0], pages, q, k, v).reshape(q.shape[0], -1)
        out = torch.empty_like(q)
        for call in step.calls:
            out[call.tokens] = self._attend(call, pages, q, k, v)
        return out.view(q.shape[0], -1)

    @staticmethod
    def _attend(call: _Call, pages: _Pages, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One set of rows; result [n * m, Hq, D]."""
        n, m, heads, dim = call.n, call.m, k.shape[1], q.shape[2]
        group = q.shape[1] // heads
        q = q[call.tokens]
        if call.key_rows is None:
            q4 = q.view(n, m, -1, dim).transpose(1, 2)
            k4 = k[call.tokens].view(n, m, heads, dim).transpose(1, 2)
            v4 = v[call.tokens].view(n, m, heads, dim).transpose(1, 2)
            out = scaled_dot_product_attention(
                q4, k4, v4, attn_mask=call.mask, is_causal=call.mask is None, enable_gqa=group > 1
            )
            return out.transpose(1, 2).reshape(n * m, -1, dim)
        keys = pages.read(call.key_rows, q.dtype).view(n, heads, -1, dim)
        values = pages.read(call.key_rows + heads, q.dtype).view(n, heads, -1, dim)
        # The queries of one KV head stand together, so that no key is copied for each of them.
        q4 = q.view(n, m, heads, group, dim).permute(0, 2, 3, 1, 4).reshape(n, heads, group * m, dim)
        mask = call.mask
        if mask is not None and m > 1 and group > 1:
            mask = mask.repeat(1, 1, group, 1)
        out = scaled_dot_product_attention(q4, keys, values, attn_mask=mask)
        return out.view(n, heads, group, m, dim).permute(0, 3, 1, 2, 4).reshape(n * m, -1, dim)
