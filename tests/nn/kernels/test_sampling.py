"""The fast sampler keeps the same tokens as sorting does and picks the same one; its draws follow the distribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.nn.kernels import edits, philox, sampling
from penstock.nn.kernels.edits import RowParams
from penstock.nn.kernels.native import NativeScores, usable_kernels
from penstock.nn.kernels.sampling import NO_TOKEN, NOT_A_NUMBER, choose_reference, kept_reference

Choose = Callable[[Tensor, RowParams], np.ndarray]


def params_of(num_rows: int, **fields) -> RowParams:
    """Parameters of N rows, each field one value for all or an array; row i has seed i and position 1000 + i."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **fields}
    values = {"seeds": np.arange(num_rows), "positions": 1000 + np.arange(num_rows), **values}
    dtypes = {"temperature": np.float32, "top_k": np.int64, "positions": np.int64, "seeds": np.uint64}
    return RowParams(**{k: np.broadcast_to(v, num_rows).astype(dtypes.get(k, np.float64)) for k, v in values.items()})


def random_params(num_rows: int, rng: np.random.Generator, size: int) -> RowParams:
    """Every mix of filters, off and on, at edges and beyond the vocabulary."""

    def pick(*choices):
        return rng.choice(np.array(choices), num_rows)

    return params_of(
        num_rows,
        temperature=pick(0.0, 0.02, 0.5, 0.7, 1.0, 1.0, 1.5, 100.0),
        top_k=pick(-1, 0, 0, 1, 2, 5, 40, 300, size - 1, size, size + 5),
        top_p=pick(1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999),
        min_p=pick(0.0, 0.0, 1e-4, 0.05, 0.5, 1.0),
        seeds=rng.integers(0, 2**64, num_rows, np.uint64),
        positions=rng.integers(0, 2**17, num_rows),
    )


def random_scores(num_rows: int, size: int, rng: np.random.Generator) -> Tensor:
    """Scores of all shapes: peaked and flat, full of ties, with forbidden tokens; never a whole row forbidden."""
    scores = rng.normal(0, 1, (num_rows, size)) * rng.choice([0.1, 1, 3, 8], (num_rows, 1)) + rng.normal(0, 20)
    coarse = rng.random(num_rows) < 0.4
    scores[coarse] = np.round(scores[coarse] * 2) / 2
    forbidden = (rng.random((num_rows, size)) < rng.choice([0, 0, 0.3, 0.99], (num_rows, 1))) & (rng.random() < 0.5)
    forbidden[np.arange(num_rows), rng.integers(0, size, num_rows)] = False
    scores[forbidden] = -np.inf
    return torch.from_numpy(scores.astype(np.float32))


def kept_by_floors(scores: Tensor, params: RowParams) -> np.ndarray:
    """What the fast path keeps, of rows whose parameters are all sampled."""
    num_rows, size = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -size % philox.GROUP), value=-torch.inf)
    best, best_ids = (a.numpy() for a in scores.max(1))
    floor = sampling.floors_cpu(padded, np.arange(num_rows), best, best_ids, params)
    return (scores.numpy() >= floor[:, None]) & (scores.numpy() > -np.inf)


def top_p_is_decided_by_rounding(scores: Tensor, params: RowParams) -> np.ndarray:
    """Rows where a float32 mass (relative error 1e-6) may put the top_p cut elsewhere than a float64 one."""
    low = dataclasses.replace(params, top_p=params.top_p * (1 - 1e-6))
    high = dataclasses.replace(params, top_p=np.minimum(params.top_p * (1 + 1e-6), 1.0))
    differ = (kept_reference(scores, low) != kept_reference(scores, high)).any(1).numpy()
    return differ & (params.top_p < 1)


@pytest.fixture(params=["torch", *usable_kernels()])
def choose(request) -> Choose:
    """The sampler of plain torch, and every native one of this machine."""
    if request.param == "torch":
        return sampling.choose
    return lambda scores, params: NativeScores(scores, request.param).choose(params, None, np.empty(0, np.int64))[0]


pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (1, 2, 7, 127, 128, 129, 500, 1024, 1025, 3000, 8192)


@pytest.mark.parametrize("size", SIZES)
def test_kept_sets_equal_those_of_sorting(size):
    """12,150 rows in all: ties, forbidden tokens, k beyond V, one-token vocabularies. The kept set is that of sorting
    in float64 in every row whose cut float32 can decide; those it cannot are below 2 %."""
    rng = np.random.default_rng(size)
    num_rows = 250 if size < 2000 else 90
    undecided = num_wrong = 0
    for _ in range(5):
        scores = random_scores(num_rows, size, rng)
        params = random_params(num_rows, rng, size)
        params.temperature[params.temperature == 0] = 0.3
        expected = kept_reference(scores, params).numpy() & (scores.numpy() > -np.inf)
        unlike = (kept_by_floors(scores, params) != expected).any(1)
        close = top_p_is_decided_by_rounding(scores, params)
        undecided += int(close.sum())
        num_wrong += int((unlike & ~close).sum())
        assert expected.any(1).all()
    assert num_wrong == 0
    assert undecided < 0.02 * 5 * num_rows


def kept_by_definition(row: list[float], temperature: float, k: int, top_p: float, min_p: float) -> set[int]:
    """The file's definitions, read literally, without sorting."""
    best = max(row)
    weight = [math.exp((x - best) / temperature) for x in row]
    kept = {i for i, x in enumerate(row) if k <= 0 or sum(other > x for other in row) < k}
    total = sum(weight[i] for i in kept)
    if top_p < 1:
        kept = {i for i in kept if sum(weight[j] for j in kept if row[j] > row[i]) < top_p * total}
    return {i for i in kept if weight[i] >= min_p}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=1, max_size=12),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(-1, 14),
    st.sampled_from([0.2137, 0.55321, 0.91234, 1.0]),
    st.sampled_from([0.0, 0.0313, 0.3017]),
)
def test_the_reference_keeps_what_the_definition_says(row, temperature, k, top_p, min_p):
    """Small rows with ties: the sorted reference and the fast path keep the set that the definition spells out."""
    scores = torch.tensor([row], dtype=torch.float32)
    params = params_of(1, temperature=temperature, top_k=k, top_p=top_p, min_p=min_p)
    expected = kept_by_definition(row, temperature, k, top_p, min_p)
    assert set(kept_reference(scores, params)[0].nonzero().flatten().tolist()) == expected
    assert set(np.flatnonzero(kept_by_floors(scores, params)[0])) == expected


@pytest.mark.parametrize("size", SIZES)
def test_the_chosen_token_is_the_reference_argmax(choose, size):
    """Rows with any parameters, greedy ones among them: the token that sorting and noise for the whole vocabulary give,
    in every row whose kept set float32 can decide."""
    rng = np.random.default_rng(100 + size)
    num_rows = 200 if size < 2000 else 60
    for _ in range(3):
        scores, params = random_scores(num_rows, size, rng), random_params(num_rows, rng, size)
        before = scores.clone()
        unlike = np.flatnonzero(choose(scores, params) != choose_reference(scores, params).numpy())
        assert torch.equal(scores, before)
        params.temperature[params.temperature == 0] = 1
        assert top_p_is_decided_by_rounding(scores, params)[unlike].all()


@pytest.mark.parametrize("size", [60, 1000, 8192])
def test_a_row_does_not_depend_on_its_batch(choose, size):
    """Rows of every kind: the same tokens alone, in pairs, reversed and all together, on two threads; E0."""
    torch.set_num_threads(2)
    rng = np.random.default_rng(size)
    scores, params = random_scores(96, size, rng), random_params(96, rng, size)
    together = choose(scores, params)
    alone = np.concatenate([choose(scores[i : i + 1], params.take(np.array([i]))) for i in range(96)])
    pairs = np.concatenate([choose(scores[i : i + 2], params.take(np.arange(i, i + 2))) for i in range(0, 96, 2)])
    backwards = choose(scores.flip(0), params.take(np.arange(96)[::-1]))[::-1]
    torch.set_num_threads(1)
    assert together.tolist() == alone.tolist() == pairs.tolist() == backwards.tolist()


@pytest.mark.parametrize(
    ("size", "filters"),
    [
        (40, {}),
        (40, {"temperature": 0.6, "top_k": 12}),
        (40, {"top_p": 0.8}),
        (40, {"temperature": 1.3, "top_k": 25, "top_p": 0.9, "min_p": 0.03}),
        (300, {"temperature": 1.2}),
        (1100, {"top_p": 0.97}),
    ],
)
def test_draws_follow_the_filtered_distribution(choose, size, filters):
    """200,000 draws with different seeds and positions: a G-test against the exact chances, and nothing outside the
    kept set. Rare tokens are pooled so that 20 draws are expected in each bin."""
    rng = np.random.default_rng(size)
    row = torch.from_numpy(rng.normal(0, 2, (1, size)).astype(np.float32))
    kept = kept_reference(row, params_of(1, **filters))[0].numpy()
    weights = np.exp(row[0].numpy().astype(np.float64) / filters.get("temperature", 1.0)) * kept
    chances = weights / weights.sum()
    counts = np.zeros(size)
    for at in range(0, 200_000, 2000):
        seeds = np.repeat(np.arange(at, at + 2000, 100), 100)  # 2,000 seeds with 100 positions each
        params = params_of(2000, seeds=seeds, positions=np.tile(np.arange(100), 20), **filters)
        counts += np.bincount(choose(row.expand(2000, -1), params), minlength=size)
    assert counts[~kept].sum() == 0
    expected = chances * counts.sum()
    order = np.argsort(-expected)
    common = order[expected[order] >= 20]
    observed, wanted = counts[common], expected[common]
    if len(common) < kept.sum():
        observed = np.append(observed, counts.sum() - observed.sum())
        wanted = np.append(wanted, expected.sum() - wanted.sum())
    seen = observed > 0
    g, freedom = 2 * (observed[seen] * np.log(observed[seen] / wanted[seen])).sum(), len(wanted) - 1
    deviations = ((g / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert -4.5 < deviations < 4


def test_far_away_tokens_win_together(choose):
    """One token leads by 6.5 nats, but the 4,095 others weigh six times as much: drawn as by the reference."""
    scores = torch.full((150, 4096), -6.5)
    scores[:, 5] = 0.0
    drawn = choose(scores, params_of(150))
    assert (drawn == choose_reference(scores, params_of(150)).numpy()).all()
    assert 6 < (drawn == 5).sum() < 42  # 21 are expected


def test_equal_perturbed_scores_give_the_lowest_id(monkeypatch):
    """With noise rounded to halves, ties for the best are common: the lowest id, like argmax of the reference."""

    def coarse(times):
        if isinstance(times, Tensor):
            return (torch.floor(-2 * torch.log(times)) / 2).float()
        return (np.floor(-2 * np.log(times)) / 2).astype(np.float32)

    monkeypatch.setattr(philox, "gumbel_of", coarse)
    scores = torch.zeros(200, 600)
    params = params_of(200, top_k=np.tile([0, 9], 100))
    assert (sampling.choose(scores, params) == choose_reference(scores, params).numpy()).all()


def test_min_p_cuts_where_float64_does():
    """Tokens one float below, at and above the cut `log(min_p)`: kept as the float64 comparison says."""
    min_p = np.random.default_rng(2).uniform(0.001, 0.5, 200)
    cut = np.log(min_p).astype(np.float32)
    around = (np.nextafter(cut, np.float32(-np.inf)), cut, np.nextafter(cut, np.float32(np.inf)))
    scores = torch.from_numpy(np.stack((np.zeros(200, np.float32), *around), 1))
    kept = kept_by_floors(scores, params_of(200, min_p=min_p))
    assert (kept == (scores.numpy() >= np.log(min_p)[:, None])).all()
    assert 50 < kept[:, 2].sum() < 150


def test_greedy_takes_the_lowest_of_equals_and_no_filter(choose):
    """Temperature 0: the first of the best tokens, also across groups, whatever top_k, top_p and min_p say."""
    scores = torch.zeros(3, 600)
    scores[0, [599, 300, 130]] = 2.5
    scores[1, [7, 5]] = 1.0
    params = params_of(3, temperature=0, top_k=3, top_p=0.1, min_p=0.9)
    assert choose(scores, params).tolist() == [130, 5, 0]


def test_bad_rows_fail_alone(choose):
    """NaN anywhere or nothing allowed: that row says so; +inf wins; the neighbours' tokens are those without them."""
    rng = np.random.default_rng(3)
    scores = random_scores(8, 1000, rng)
    params = params_of(8, temperature=[0, 1, 1, 1, 0, 1, 0.7, 1], top_k=[0, 0, 20, 0, 0, 9, 0, 5], top_p=0.9)
    good = choose(scores, params)
    scores[1, 999] = torch.nan
    scores[4, 0] = torch.nan
    scores[2] = -torch.inf
    scores[5, [30, 700]] = torch.inf
    scores[6, 40] = torch.inf
    scores[6, 41] = torch.nan
    found = choose(scores, params)
    assert found[[1, 2, 4, 6]].tolist() == [NOT_A_NUMBER, NO_TOKEN, NOT_A_NUMBER, NOT_A_NUMBER]
    assert found[5] in (30, 700)
    assert found[[0, 3, 7]].tolist() == good[[0, 3, 7]].tolist()
    assert torch.isnan(scores[1, 999])
    assert scores[2, 0] == -torch.inf


def test_several_infinite_scores_share_the_draws(choose):
    """Tokens with +inf are equals: each of three gets about a third of 3,000 draws, greedy takes the lowest."""
    scores = torch.zeros(1, 300)
    scores[0, [5, 200, 290]] = torch.inf
    counts = np.bincount(choose(scores.expand(3000, -1), params_of(3000, top_k=50)), minlength=300)
    assert counts[[5, 200, 290]].sum() == 3000
    assert counts[[5, 200, 290]].min() > 850
    assert choose(scores, params_of(1, temperature=0)).tolist() == [5]


def test_rows_of_equal_scores(choose):
    """A model that says nothing: every token is kept and every token is drawn, by each path to the floors."""
    for size in (5000, 20000):
        scores = torch.zeros(40, size)
        params = params_of(40, top_k=np.tile([3, 0, 2000, 0], 10), top_p=np.tile([1.0, 0.9, 0.9, 0.999], 10))
        assert kept_by_floors(scores, params).all()
        drawn = choose(scores, params)
        assert len(set(drawn.tolist())) > 35
        assert (drawn == choose_reference(scores, params).numpy()).all()


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extreme_scales(choose, temperature, scale):
    """Scores and temperatures far from 1 overflow nowhere and give the reference's token."""
    rng = np.random.default_rng(8)
    scores = torch.from_numpy((rng.normal(0, 3, (30, 2000)) * scale).astype(np.float32))
    params = params_of(30, temperature=temperature, top_p=np.tile([1.0, 0.7], 15), min_p=np.tile([0, 0, 0.1], 10))
    with np.errstate(over="ignore"):
        assert (choose(scores, params) == choose_reference(scores, params).numpy()).all()


def test_shapes_and_strides(choose):
    """No rows give no tokens; a slice of wider rows gives what its copy gives."""
    assert choose(torch.empty(0, 100), params_of(0)).tolist() == []
    wide = torch.randn(6, 900, generator=torch.Generator().manual_seed(1))
    params = params_of(6, top_p=0.9)
    assert (choose(wide[:, 100:612], params) == choose(wide[:, 100:612].contiguous(), params)).all()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_penalties_follow_the_formula(data):
    """Any scores, counts and factors: repetition first (by the sign of the score), then frequency and presence."""
    finite = st.floats(-50, 50, width=32)
    rows = data.draw(st.lists(st.tuples(finite, st.integers(0, 9)), min_size=1, max_size=10))
    repetition = data.draw(st.floats(0.25, 4, width=32))
    frequency, presence = data.draw(st.floats(-2, 2, width=32)), data.draw(st.floats(-2, 2, width=32))
    found = edits.penalise(
        torch.tensor([x for x, _ in rows]), torch.tensor([c for _, c in rows]), repetition, frequency, presence
    )
    expected = [
        (x / repetition if x > 0 else x * repetition) - frequency * c - presence * (1 if c > 0 else 0) for x, c in rows
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_logprobs_are_those_of_the_raw_scores():
    """The token's log probability, its rank and the best ones, against torch's log_softmax and a stable sort."""
    rng = np.random.default_rng(4)
    scores = torch.from_numpy(np.round(rng.normal(0, 3, (40, 700)) * 4).astype(np.float32) / 4)  # many ties
    token_ids, nums = rng.integers(0, 700, 40), rng.integers(0, 21, 40)
    chosen, ranks, ids, values = sampling.logprobs(scores, token_ids, nums)
    logs = torch.log_softmax(scores, 1)
    for i in range(40):
        assert chosen[i] == logs[i, token_ids[i]]
        assert ranks[i] == 1 + int((logs[i] > logs[i, token_ids[i]]).sum())
        best = torch.sort(logs[i], descending=True, stable=True)
        assert ids[i].tolist() == best.indices[: nums[i]].tolist()
        assert values[i].tolist() == best.values[: nums[i]].tolist()
    alone = sampling.logprobs(scores[7:8], token_ids[7:8], nums[7:8])
    assert (alone[0][0], alone[1][0]) == (chosen[7], ranks[7])
    assert alone[2][0].tolist() == ids[7].tolist()


def test_logprobs_of_bad_rows_harm_no_others():
    """NaN gives NaN and no best tokens; +inf has probability one; more best tokens than the vocabulary has is all."""
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0], [0.0, 1.0, 2.0]])
    chosen, ranks, ids, values = sampling.logprobs(scores, np.array([0, 1, 2]), np.array([2, 1, 9]))
    assert math.isnan(chosen[0])
    assert ids[0].tolist() == []
    assert (chosen[1], ranks[1], ids[1].tolist()) == (0.0, 1, [1])
    assert ids[2].tolist() == [2, 1, 0]
    assert np.exp(values[2]).sum() == pytest.approx(1)
