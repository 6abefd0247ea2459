"""The head and the choice in one native call: the tokens of the head's scores, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.nn.kernels.edits import Ragged, RowEdits, RowParams
from penstock.nn.kernels.native import FORMATS, NativeScores, load_native, native_asked, usable_kernels
from penstock.nn.kernels.sampling import NO_TOKEN, NOT_A_NUMBER

KERNELS = usable_kernels()
pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="the native kernels were not built, or not for this machine"),
    pytest.mark.usefixtures("one_thread"),
]
NO_IDS = np.empty(0, np.int64)


class Head:
    """A random head of `size` columns over `width` inputs, with or without a bias."""

    def __init__(self, kernels: str, size: int, width: int, biased: bool, threads: int, kind: str = "bf16") -> None:
        native = load_native()
        draw = torch.Generator().manual_seed(size)
        self.kernels, self.size = kernels, size
        team = native.Team(threads, [])
        self._weight = native.PackedWeight(FORMATS[kind], size, width)
        self._weight.fill(team, 0, torch.randn(size, width, generator=draw).bfloat16().view(torch.uint16).numpy())
        if biased:
            self._weight.set_bias(torch.randn(size, generator=draw).numpy())
        self._program = native.Program(kernels, team, 256)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(hidden), self.size)
        self._program.head(self._weight, hidden.view(torch.uint16).numpy(), found.numpy())
        return found

    def choose(self, hidden: torch.Tensor, params: RowParams, edits: RowEdits | None, reported: Any = NO_IDS) -> Any:
        tokens, raw = np.empty(len(hidden), np.int64), np.full((len(reported), self.size), np.nan, np.float32)
        asked = native_asked(params, edits, self.size)
        self._program.choose(self._weight, hidden.view(torch.uint16).numpy(), asked, reported, raw, tokens)
        return tokens, raw


def random_params(rng: np.random.Generator, num_rows: int) -> RowParams:
    return RowParams(
        rng.choice(np.array([0, 0, 0.7, 1, 3], np.float32), num_rows),
        rng.choice([0, 0, 3, 40, 5000], num_rows),
        rng.choice([1.0, 0.31, 0.97], num_rows),
        rng.choice([0.0, 0.0123], num_rows),
        rng.integers(0, 2**63, num_rows).astype(np.uint64),
        rng.integers(0, 2**17, num_rows),
    )


def random_edits(rng: np.random.Generator, num_rows: int, size: int) -> RowEdits:
    """Of every kind for some rows, and of none for others."""

    def ragged(chance: float) -> Ragged:
        most = min(size, 9)
        wanted = np.where(rng.random(num_rows) < chance, rng.integers(1, most + 1, num_rows), 0)
        return Ragged.of([rng.permutation(size)[:n] for n in wanted])

    biased, allowed, banned, occurred = ragged(0.3), ragged(0.2), ragged(0.1), ragged(0.4)
    return RowEdits(
        biased,
        rng.normal(0, 5, len(biased.ids)).astype(np.float32),
        np.diff(allowed.starts) > 0,
        allowed,
        banned,
        occurred,
        rng.integers(0, 4, len(occurred.ids)).astype(np.float32),
        rng.uniform(0.5, 2, (num_rows, 3)).astype(np.float32),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.sampled_from([1, 2, 7, 33, 150]),
    size=st.sampled_from([1, 15, 16, 100, 128, 203, 1000, 4001]),
    kind=st.sampled_from(["bf16", "w8a8", "int4"]),
    biased=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    edit=st.booleans(),
)
def test_the_fused_choice_is_that_of_the_scores(kernels, seed, num_rows, size, kind, biased, threads, edit):
    """Greedy rows that keep no scores, filtered, edited and reported ones, more of them than are held at once: bit for
    bit the scores of the head, and the tokens that are chosen from these."""
    rng = np.random.default_rng(seed)
    head = Head(kernels, size, 72, biased, threads, kind)
    hidden = torch.from_numpy(rng.normal(0, 1, (num_rows, 72)).astype(np.float32)).bfloat16()
    params = random_params(rng, num_rows)
    edits = random_edits(rng, num_rows, size) if edit else None
    reported = np.flatnonzero(rng.random(num_rows) < 0.3)
    scores = head.scores(hidden)
    tokens, raw = head.choose(hidden, params, edits, reported)
    assert (raw == scores[torch.from_numpy(reported)].numpy()).all()
    assert tokens.tolist() == NativeScores(scores, kernels).choose(params, edits, reported)[0].tolist()
    one = int(rng.integers(0, num_rows))
    alone, _ = Head(kernels, size, 72, biased, 1, kind).choose(
        hidden[one : one + 1], params.take(np.array([one])), None
    )
    if edits is None:
        assert alone[0] == tokens[one]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_states_that_are_not_numbers_fail_their_row_alone(kernels, kind):
    """NaN and infinite hidden states, greedy and sampled: NOT_A_NUMBER; what allows no token: NO_TOKEN."""
    rng = np.random.default_rng(0)
    head = Head(kernels, 500, 64, False, 2, kind)
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    params = random_params(rng, 6)
    params.temperature[:] = [0, 0, 1, 1, 0, 1]
    good, _ = head.choose(hidden, params, None)
    hidden[1, 5] = torch.nan
    hidden[2, 63] = torch.nan
    edits = random_edits(rng, 6, 500)
    none = Ragged.of([NO_IDS] * 6)
    no_values = np.empty(0, np.float32)
    edits = RowEdits(none, no_values, np.arange(6) >= 4, none, none, none, no_values, edits.penalties)
    found, _ = head.choose(hidden, params, edits)
    assert found.tolist() == [good[0], NOT_A_NUMBER, NOT_A_NUMBER, good[3], NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_takes_the_lowest_of_equals(kernels):
    """Columns that are copies of each other, across blocks, units and members: the first of the best."""
    native = load_native()
    team = native.Team(3, [])
    rows = torch.zeros(3000, 64)
    rows[[2999, 1500, 700, 701], 0] = 1.0
    weight = native.PackedWeight(FORMATS["bf16"], 3000, 64)
    weight.fill(team, 0, rows.bfloat16().view(torch.uint16).numpy())
    program = native.Program(kernels, team, 8)
    hidden = torch.zeros(3, 64)
    hidden[:, 0] = torch.tensor([1.0, 0.0, -1.0])
    zeros, ints = np.zeros(3), np.zeros(3, np.int64)
    params = RowParams(zeros.astype(np.float32), ints, zeros + 1, zeros, ints.astype(np.uint64), ints)
    tokens = np.empty(3, np.int64)
    raw = np.empty((0, 3000), np.float32)
    asked = native_asked(params, None, 3000)
    program.choose(weight, hidden.bfloat16().view(torch.uint16).numpy(), asked, NO_IDS, raw, tokens)
    assert tokens.tolist() == [700, 0, 0]


def test_what_does_not_fit_is_refused():
    """Ids outside the vocabulary, lists that do not match their starts, arrays of other lengths: an error, no crash."""
    rng = np.random.default_rng(0)
    head = Head(KERNELS[0], 50, 64, False, 1)
    hidden = torch.zeros(2, 64, dtype=torch.bfloat16)
    params, none = random_params(rng, 2), Ragged.of([NO_IDS] * 2)
    no_values = np.empty(0, np.float32)
    rest = (none, none, no_values, np.ones((2, 3), np.float32))

    def edits(biased: Ragged, bias: Any) -> RowEdits:
        return RowEdits(biased, np.array(bias, np.float32), np.zeros(2, np.bool_), none, *rest)

    for wrong in (
        edits(Ragged.of([np.array([50]), NO_IDS]), [1]),
        edits(Ragged.of([np.array([-1]), NO_IDS]), [1]),
        edits(Ragged.of([np.array([3]), NO_IDS]), []),
        edits(Ragged(np.array([0, 5, 1]), np.array([3])), [1]),
        edits(Ragged(np.array([0, 1]), np.array([3])), [1]),
    ):
        with pytest.raises(ValueError):
            head.choose(hidden, params, wrong)
    with pytest.raises(ValueError):
        head.choose(hidden, random_params(rng, 3), None)
    with pytest.raises((ValueError, IndexError)):
        head.choose(hidden, params, None, np.array([2]))
