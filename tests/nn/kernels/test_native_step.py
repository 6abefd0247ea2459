"""Layers, head and choice in one native call: the tokens that the same calls give one by one, step after step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.nn.native_model import MISTRAL, QWEN3, SIZE, Native, native, prompts

from penstock.nn.doors import Batch, Spans
from penstock.nn.kernels.edits import NO_IDS, Ids, Ragged, RowEdits, RowParams
from penstock.nn.kernels.native import NativeAttention, usable_kernels
from penstock.nn.words import StepWords

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]
ROWS, LENGTH = 3, 40
REPORTED = np.array([1])


class Decoding:
    """Three requests that decode behind prompts of equal length. All arrays move on in place, as the runner's do."""

    def __init__(self, raw: dict, kernels: str) -> None:  # type: ignore[type-arg]
        self.native: Native = native(raw, kernels)
        self.vocab_size = self.native.config.vocab_size
        self.native.step(list(zip(range(ROWS), [0] * ROWS, prompts(self.native.config, *[LENGTH] * ROWS), strict=True)))
        self.start, self.token_ids = np.full(ROWS, LENGTH), np.arange(ROWS)
        table = np.array([[1 + row + 3 * block for block in range(256 // SIZE)] for row in range(ROWS)], np.int32)
        self.spans = Spans(np.arange(ROWS + 1), self.start, (table,))
        self.tensors = torch.from_numpy(self.token_ids), torch.from_numpy(self.start)
        ones = np.ones(ROWS)
        temperature, seeds = np.array([0, 3, 3], np.float32), np.arange(ROWS, dtype=np.uint64)
        self.params = RowParams(temperature, np.zeros(ROWS, np.int64), ones, 0 * ones, seeds, self.start + 1)

    def batch(self, outputs: Ids | None = None, words: StepWords | None = None) -> Batch:
        prepared = NativeAttention().prepare(self.spans, words)
        return Batch(*self.tensors, prepared, None if outputs is None else torch.from_numpy(outputs))

    def go_on(self, tokens: Ids) -> None:
        self.token_ids[:] = tokens
        self.start += 1
        self.params.positions[:] += 1


@pytest.mark.parametrize("shape", ["qwen3", "mistral with a window"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_one_call_gives_the_tokens_of_several(kernels: str, shape: str) -> None:
    """Also of rows with a temperature, whose noise is another at each position, with edits, and reported ones."""
    raw = {"qwen3": QWEN3, "mistral with a window": MISTRAL}[shape]
    whole, parts = Decoding(raw, kernels), Decoding(raw, kernels)
    nothing = Ragged.of([NO_IDS] * ROWS)
    seen = set()
    for step in range(12):
        edits, reported = None, NO_IDS
        if step == 6:  # somebody else comes, who asks for something else
            for decoding in (whole, parts):
                decoding.params = replace(decoding.params, temperature=np.array([3, 0, 3], np.float32))
        if step % 4 == 3:
            banned = Ragged.of([np.arange(step), NO_IDS, np.array([5])])
            none, even = np.zeros(0, np.float32), np.tile(np.array((1, 0, 0), np.float32), (ROWS, 1))
            edits = RowEdits(nothing, none, np.zeros(ROWS, np.bool_), nothing, banned, nothing, none, even)
            reported = REPORTED
        found, raw_scores = whole.native.model.scores_after(whole.batch()).choose(whole.params, edits, reported)
        hidden = parts.native.model(parts.batch())
        expected, raw_expected = parts.native.model.scores(hidden).choose(replace(parts.params), edits, reported)
        assert found.tolist() == expected.tolist()
        assert raw_scores.shape == (len(reported), whole.vocab_size) and torch.equal(raw_scores, raw_expected)
        seen.add(tuple(found.tolist()))
        whole.go_on(found)
        parts.go_on(expected)
    assert len(seen) > 6
    for ours, theirs in zip(whole.native.pools, parts.native.pools, strict=True):
        assert torch.equal(ours, theirs)


def test_outputs_alone_are_chosen_for() -> None:
    whole, some = Decoding(QWEN3, KERNELS[0]), Decoding(QWEN3, KERNELS[0])
    every, _ = whole.native.model.scores_after(whole.batch()).choose(whole.params, None, NO_IDS)
    wanted = np.array([0, 2])
    found, _ = some.native.model.scores_after(some.batch(wanted)).choose(some.params.take(wanted), None, NO_IDS)
    assert found.tolist() == every[wanted].tolist()


def test_a_load_that_failed_is_told() -> None:
    decoding = Decoding(QWEN3, KERNELS[0])
    word = np.full(1, -1, np.int64)
    words = StepWords(0, np.array([word.ctypes.data]), 1.0)
    decoding.native.model.scores_after(decoding.batch(words=words)).choose(decoding.params, None, NO_IDS)
    word[0] = 1 << 20  # what the step saw counts
    assert words.bad() == [0]


@pytest.mark.parametrize("wrong", ["rows", "tokens", "outputs"])
def test_arrays_that_do_not_match_are_refused(wrong: str) -> None:
    decoding = Decoding(QWEN3, KERNELS[0])
    params, outputs = decoding.params, None
    if wrong == "rows":
        params = params.take(np.array([0, 1]))
    elif wrong == "tokens":
        decoding.tensors = decoding.tensors[0][:2], decoding.tensors[1]
    else:
        outputs = np.array([2, 1, 0])
    with pytest.raises(ValueError):
        decoding.native.model.scores_after(decoding.batch(outputs)).choose(params, None, NO_IDS)
