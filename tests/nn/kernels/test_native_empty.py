"""Native steps of no tokens, and requests without tokens among others: they work, and nothing is written for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nn.native_attention import REQUESTS, Native, drawn
from tests.nn.native_model import MISTRAL, QWEN3, native, prompts

from penstock.nn.doors import Batch, Spans
from penstock.nn.kernels.edits import NO_IDS, RowParams
from penstock.nn.kernels.native import NativeAttention, usable_kernels

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]


def memory(native: Native) -> list[torch.Tensor]:
    """The cache and what the buffers hold, as bytes, copied."""
    return [x.contiguous().view(torch.uint8).clone() for x in (native.store.pools[0], *native.read(100, 100))]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_of_no_tokens_writes_nothing(kernels: str, window: int | None, dtype: str) -> None:
    """Without a request, or with requests that bring none: not even the zeros of a block that is begun."""
    for num_threads in (1, 2):
        ours = Native(drawn(2, 3, 32, 1, 100), kernels, 2, 3, 32, window, num_threads, dtype)
        ours.store.pools[0].view(torch.uint8).fill_(0xFF)
        ours.step([])  # also before any other
        assert ours.store.pools[0].view(torch.uint8).eq(0xFF).all()
        ours.step([(0, 0, 64), (1, 0, 33)])
        before = memory(ours)
        for rows in ([], [(0, 64, 0)], [(2, 0, 0), (1, 33, 0), (0, 32, 0)]):
            for outputs in (None, []):
                qkv, out = ours.step(rows, outputs)
                assert len(qkv) == len(out) == 0
                assert all(map(torch.equal, memory(ours), before))


ROWS = st.tuples(st.integers(0, 70) | st.sampled_from([0, 512, 530]), st.integers(0, 2) | st.integers(0, 40))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    kernels=st.sampled_from(KERNELS or ("none",)),
    shape=st.sampled_from([(1, 1, 16), (2, 3, 32), (1, 8, 64)]),
    rows=st.lists(ROWS, min_size=1, max_size=REQUESTS),
    window=st.none() | st.integers(1, 600),
    num_threads=st.sampled_from([1, 2]),
)
def test_a_request_without_tokens_changes_nothing(
    dtype: str,
    data: st.DataObject,
    kernels: str,
    shape: tuple[int, int, int],
    rows: list[tuple[int, int]],
    window: int | None,
    num_threads: int,
) -> None:
    """The others get the bits that they get without it, and so does the cache; also where few outputs are read."""
    settled = (drawn(*shape, 2, 570), kernels, *shape, window, num_threads, dtype)
    every, some = Native(*settled), Native(*settled)
    prefixes = [(request, 0, cached) for request, (cached, _) in enumerate(rows) if cached]
    every.step(prefixes, [])
    some.step(prefixes, [])
    taken = data.draw(st.permutations([(request, cached, num) for request, (cached, num) in enumerate(rows)]))
    others = [row for row in taken if row[2]]
    ends = np.cumsum([num for *_, num in others]) - 1
    for outputs in (None, ends.tolist()):
        found, expected = every.step(taken, outputs), some.step(others, outputs)
        for ours, theirs in zip((*found, every.store.pools[0]), (*expected, some.store.pools[0]), strict=True):
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("weights", ["bf16", "w8a8", "w4a8"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_model_takes_a_batch_of_no_tokens(kernels: str, weights: str) -> None:
    """Layers, head and choice, in one call or several; the next step is what it would have been."""
    for raw in (QWEN3, MISTRAL):
        ours, theirs = (native(raw, kernels, formats=(weights, weights)) for _ in range(2))
        (ids,) = prompts(ours.config, 41)
        for each in (ours, theirs):
            each.step([(0, 0, ids[:40])])
        before = [pool.clone() for pool in ours.pools]
        nothing, no_table = torch.empty(0, dtype=torch.int64), np.empty((0, 2), np.int32)
        spans = Spans(np.zeros(1, np.int64), NO_IDS, (no_table,))
        none = np.empty(0)
        params = RowParams(none.astype(np.float32), NO_IDS, none, none, NO_IDS.astype(np.uint64), NO_IDS)
        for outputs in (None, nothing):
            batch = Batch(nothing, nothing, NativeAttention().prepare(spans), outputs)
            hidden = ours.model(batch)
            assert hidden.shape == (0, ours.config.hidden_size)
            assert ours.model.logits(hidden).shape == (0, ours.config.vocab_size)
            for scores in (ours.model.scores(hidden), ours.model.scores_after(batch)):
                tokens, raw_scores = scores.choose(params, None, NO_IDS)
                assert len(tokens) == len(raw_scores) == 0
        assert all(map(torch.equal, ours.pools, before))
        assert torch.equal(ours.step([(0, 40, ids[40:])]), theirs.step([(0, 40, ids[40:])]))
