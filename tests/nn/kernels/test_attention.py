"""PagedAttention against the float32 reference: ragged mixes of prompts and decodes, windows, grouped queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.config.model import KVGroup, KVLayout
from penstock.nn.doors import Spans
from penstock.nn.kernels import attention
from penstock.nn.kernels.attention import PagedAttention, attention_reference

# Largest absolute error for values of size one: rounding of the dtype, and of scores that are a sum over the head.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Cache:
    """Requests with known keys and values, scattered over the blocks of two layers' pools."""

    def __init__(
        self, rows: list[tuple[int, int]], heads: int, dim: int, block_size: int, window: int | None,
        dtype: torch.dtype, seed: int, pool_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.window = rows, window
        draw = torch.Generator().manual_seed(seed)
        random = np.random.default_rng(seed)
        pool_dtype = pool_dtype or dtype
        counts = [-(-(start + num) // block_size) for start, num in rows]
        num_blocks = sum(counts) + 1
        kind = "full" if window is None else "window"
        group = KVGroup(0, kind, (0, 1), window, block_size, heads, dim, str(pool_dtype).removeprefix("torch."))
        self.pools = [torch.zeros(num_blocks, 2, heads, block_size, dim, dtype=pool_dtype) for _ in range(2)]
        ids = random.permutation(np.arange(1, num_blocks))
        table = np.zeros((len(rows), max(counts)), np.int32)
        self.keys, self.values = [], []
        at = 0
        for r, (start, num) in enumerate(rows):
            table[r, : counts[r]] = ids[at : at + counts[r]]
            at += counts[r]
            k, v = torch.randn(2, start + num, heads, dim, generator=draw).to(pool_dtype).to(dtype)
            self.keys.append(k)
            self.values.append(v)
            for position in range(start):
                block, offset = table[r, position // block_size], position % block_size
                self.pools[1][block, 0, :, offset] = k[position].to(pool_dtype)
                self.pools[1][block, 1, :, offset] = v[position].to(pool_dtype)
            if window is not None:  # blocks that no query can see have been given back
                table[r, : max(0, start - window + 1) // block_size] = 0
        self.table = table
        layout = KVLayout((group,))
        self.backend = PagedAttention(layout, self.pools, dtype)
        nums = [num for _, num in rows]
        starts = np.array([start for start, _ in rows], np.int32)
        self.spans = Spans(np.cumsum([0, *nums]).astype(np.int32), starts, (table,))

    def new(self, of: list[torch.Tensor]) -> torch.Tensor:
        """The keys or values of the tokens that this step computes, as the model hands them over."""
        return torch.cat([each[start:] for each, (start, _) in zip(of, self.rows, strict=True)])

    def run(self, q: torch.Tensor) -> torch.Tensor:
        return self.backend.prepare(self.spans).run(1, q, self.new(self.keys), self.new(self.values))

    def reference(self, q: torch.Tensor) -> torch.Tensor:
        parts = q.split([num for _, num in self.rows])
        each = zip(parts, self.keys, self.values, self.rows, strict=True)
        return torch.cat([attention_reference(p, k, v, start, self.window) for p, k, v, (start, _) in each]).flatten(1)


def queries(cache: Cache, group: int, dtype: torch.dtype) -> torch.Tensor:
    num_tokens, heads, dim = cache.new(cache.keys).shape
    return torch.randn(num_tokens, heads * group, dim, generator=torch.Generator().manual_seed(5)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40) | st.just(1)), min_size=1, max_size=7),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from([8, 20, 32]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    window=st.none() | st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1 << 20),
)
def test_any_mix_agrees_with_the_reference(
    rows: list[tuple[int, int]], heads: int, group: int, dim: int, block_size: int, window: int | None,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    cache = Cache(rows, heads, dim, block_size, window, dtype, seed)
    for r, (start, num) in enumerate(rows):  # somebody else had the blocks that this step begins
        cache.pools[1][cache.table[r, -(-start // block_size) : -(-(start + num) // block_size)]] = torch.nan
    q = queries(cache, group, dtype)
    out = cache.run(q)
    assert (out - cache.reference(q)).abs().max() <= TOLERANCE[dtype]
    for r, (start, num) in enumerate(rows):  # what later steps will read, and nothing else
        for position in range(start, start + num):
            block, offset = cache.table[r, position // block_size], position % block_size
            assert torch.equal(cache.pools[1][block, 0, :, offset], cache.keys[r][position])
            assert torch.equal(cache.pools[1][block, 1, :, offset], cache.values[r][position])
    assert not cache.pools[0].any()
    assert not cache.pools[1][0].any()


def test_large_calls_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(40, 3)] * 9 + [(0, 33)] * 4
    cache = Cache(rows, 2, 16, 16, None, torch.float32, 1)
    q = queries(cache, 2, torch.float32)
    whole = cache.run(q)
    monkeypatch.setattr(attention, "MAX_SCORES", 300)
    step = cache.backend.prepare(cache.spans)
    assert len(step._groups[0].calls) > 2
    torch.testing.assert_close(step.run(1, q, cache.new(cache.keys), cache.new(cache.values)), whole)


def test_a_narrower_cache_rounds_what_it_stores_and_what_it_reads() -> None:
    rows = [(0, 5), (17, 1), (9, 20)]
    cache = Cache(rows, 2, 16, 16, None, torch.float32, 2, pool_dtype=torch.bfloat16)
    q = queries(cache, 2, torch.float32)
    exact = [k + torch.randn(k.shape, generator=torch.Generator().manual_seed(3)) * 1e-4 for k in cache.keys]
    out = cache.backend.prepare(cache.spans).run(1, q, cache.new(exact), cache.new(cache.values))
    cache.keys = [
        torch.cat((k[:start], e[start:].bfloat16().float()))
        for k, e, (start, _) in zip(cache.keys, exact, rows, strict=True)
    ]
    assert (out - cache.reference(q)).abs().max() <= TOLERANCE[torch.float32]


def test_the_reference_is_softmax_over_what_a_query_sees() -> None:
    q, v = torch.zeros(2, 1, 4), torch.arange(12.0).view(3, 1, 4)
    out = attention_reference(q, torch.zeros(3, 1, 4), v, start=1, window=None)
    assert torch.allclose(out, torch.stack((v[:2].mean(0), v.mean(0))))
    out = attention_reference(q, torch.zeros(3, 1, 4), v, start=1, window=1)
    assert torch.allclose(out, v[1:])
