"""A rank's sampler: each wish is applied as defined, in order, whoever shares the batch, and after preemption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.plan import Admitted
from penstock.core.request import SamplingParams
from penstock.nn.doors import Scores
from penstock.nn.kernels.edits import RowParams
from penstock.nn.kernels.native import NativeScores, usable_kernels
from penstock.nn.kernels.sampling import DenseScores, choose_reference
from penstock.runner.sampler import Occurrences, Sampler

VOCAB = 300
chosen_by = "torch"


def admitted(params: SamplingParams, prompt=(1, 2, 3), output=(), seed=7, stop_ids=()) -> Admitted:
    return Admitted("r", (*prompt, *output), len(prompt), params, seed, frozenset(stop_ids))


@pytest.fixture(autouse=True, params=["torch", *usable_kernels()])
def chooser(request) -> None:
    """Every test chooses with plain torch and with every native sampler of this machine."""
    global chosen_by
    chosen_by = request.param


def scores_of(scores: Tensor) -> Scores:
    return DenseScores(scores) if chosen_by == "torch" else NativeScores(scores, chosen_by)


def sampler_of(*requests: Admitted, vocab: int = VOCAB) -> Sampler:
    sampler = Sampler(len(requests) + 2, vocab)
    for slot, request in enumerate(requests):
        sampler.admit(slot, request)
    return sampler


def sample_one(request: Admitted, scores: list[float] | Tensor):
    """The output for one request at the position after its tokens."""
    row = torch.as_tensor(scores, dtype=torch.float32).clone()[None]
    return sampler_of(request, vocab=row.shape[1]).sample(
        scores_of(row), np.array([0]), np.array([len(request.token_ids)])
    )


def edited(request: Admitted, scores: Tensor) -> Tensor:
    """The documented edits of one row, token by token, in float32."""
    params, row = request.params, scores.clone().numpy()
    prompt, output = request.token_ids[: request.prompt_len], request.token_ids[request.prompt_len :]
    for token_id, bias in (params.logit_bias or {}).items():
        row[token_id] += np.float32(bias)
    if params.allowed_token_ids is not None:
        for token_id in range(len(row)):
            if token_id not in params.allowed_token_ids:
                row[token_id] = -np.inf
    for word in params.bad_words_ids:
        if len(word) == 1 or output[-(len(word) - 1) :] == word[:-1]:
            row[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token_id in request.stop_ids:
            row[token_id] = -np.inf
    repetition = np.float32(params.repetition_penalty)
    for token_id in set(prompt) | set(output):
        row[token_id] = row[token_id] / repetition if row[token_id] > 0 else row[token_id] * repetition
        row[token_id] -= np.float32(params.frequency_penalty) * np.float32(output.count(token_id))
        row[token_id] -= np.float32(params.presence_penalty if token_id in output else 0)
    return torch.from_numpy(row)


def expected_token(request: Admitted, scores: Tensor) -> int:
    """The token of the documented edits followed by the sorting reference."""
    params = request.params
    row_params = RowParams(
        np.array([params.temperature], np.float32),
        np.array([params.top_k]),
        np.array([params.top_p]),
        np.array([params.min_p]),
        np.array([request.seed % 2**64], np.uint64),
        np.array([len(request.token_ids)]),
    )
    return int(choose_reference(edited(request, scores)[None], row_params)[0])


ids = st.integers(0, VOCAB - 1)
few_ids = st.lists(ids, min_size=1, max_size=6).map(tuple)


@st.composite
def requests(draw) -> Admitted:
    """A request with any mix of wishes, somewhere in its output; often plain, as most are."""
    fields = {"temperature": draw(st.sampled_from([0.0, 0.0, 0.7, 1.0, 1.0, 1.4]))}
    wishes = {
        "top_k": st.sampled_from([1, 5, 50, 400]),
        "top_p": st.sampled_from([0.31, 0.87]),
        "min_p": st.sampled_from([0.021, 0.2]),
        "repetition_penalty": st.sampled_from([0.5, 1.2, 2.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.3, 2.0]),
        "presence_penalty": st.sampled_from([-1.5, 1.0]),
        "logit_bias": st.dictionaries(ids, st.sampled_from([-100.0, -3.0, 2.0, 40.0]), min_size=1, max_size=4),
        "allowed_token_ids": st.lists(ids, min_size=20, max_size=60, unique=True).map(tuple),  # more than all bans
        "min_tokens": st.integers(1, 6),
        "logprobs": st.integers(0, 4),
    }
    for name in draw(st.lists(st.sampled_from(sorted(wishes)), max_size=4, unique=True)):
        fields[name] = draw(wishes[name])
    prompt, output = draw(few_ids), draw(st.lists(ids, max_size=8).map(tuple))
    if draw(st.booleans()):
        words = draw(st.lists(few_ids.map(lambda w: w[:3]), min_size=1, max_size=3))
        fields["bad_words_ids"] = (*words, (*output[-2:], draw(ids)))
    params = SamplingParams(max_tokens=None, **fields)
    return admitted(
        params, prompt, output, draw(st.integers(-(2**63), 2**64 - 1)), draw(st.frozensets(ids, max_size=3))
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=12), st.integers(0, 2**32))
def test_any_batch_gives_each_request_its_own_token(batch, seed):
    """Any mix of requests on equal scores: bit for bit the outcome of each alone, and the token of the plain
    edits followed by the sorting reference."""
    scores = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (len(batch), VOCAB)).astype(np.float32))
    positions = np.array([len(request.token_ids) for request in batch])
    together = sampler_of(*batch).sample(scores_of(scores.clone()), np.arange(len(batch)), positions)
    assert together.failed == {}
    for row, request in enumerate(batch):
        alone = sample_one(request, scores[row])
        assert together.token_ids[row] == alone.token_ids[0] == expected_token(request, scores[row])
        assert together.logprobs.get(row) == alone.logprobs.get(0)
        assert (request.params.logprobs is not None) == (row in together.logprobs)


@settings(max_examples=60, deadline=None)
@given(requests(), st.lists(ids, min_size=1, max_size=80))
def test_accepting_tokens_equals_being_admitted_with_them(request_, later):
    """A request that committed tokens one by one, or in one call, samples like one that comes back after preemption."""
    scores = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (1, VOCAB)).astype(np.float32))
    resumed = Admitted(
        "r",
        (*request_.token_ids, *later),
        request_.prompt_len,
        request_.params,
        request_.seed,
        request_.stop_ids,
    )
    expected = sample_one(resumed, scores[0])
    at = np.array([len(resumed.token_ids)])
    one_by_one, at_once = sampler_of(request_), sampler_of(request_)
    for token_id in later:
        one_by_one.accept(0, token_id)
    at_once.accept(np.zeros(len(later), np.int64), np.array(later))
    for sampler in (one_by_one, at_once):
        found = sampler.sample(scores_of(scores.clone()), np.array([0]), at)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.logprobs == expected.logprobs


def test_repetition_counts_the_prompt_and_the_others_only_the_output():
    """Prompt token 1, output token 2: the three penalties, one at a time, take the lead from the right tokens."""
    scores = [0.0, 1.2, 1.1, 1.0]

    def token(**fields) -> int:
        request = admitted(SamplingParams(temperature=0, **fields), prompt=(1,), output=(2, 2))
        return int(sample_one(request, scores).token_ids[0])

    assert token() == 1
    assert token(repetition_penalty=1.5) == 3
    assert token(logit_bias={1: -5.0}) == 2
    assert token(logit_bias={1: -5.0}, frequency_penalty=0.06) == 3  # twice 0.06 is more than the lead of 0.1
    assert token(logit_bias={1: -5.0}, frequency_penalty=0.04) == 2
    assert token(logit_bias={1: -5.0}, presence_penalty=0.11) == 3
    assert token(presence_penalty=2.0) == 1


def test_min_tokens_forbids_the_stop_ids_until_then():
    """Stop id 3 has the best score: it comes with the third token, not before."""
    request = admitted(SamplingParams(temperature=0, min_tokens=2), stop_ids={3})
    sampler = sampler_of(request, vocab=5)
    scores = torch.tensor([[0, 0, 1, 9, 0.0]])
    outputs = [sampler.sample(scores_of(scores.clone()), np.array([0]), np.array([at])) for at in (3, 4, 5)]
    tokens = [int(output.token_ids[0]) for output in outputs]
    assert tokens == [2, 2, 3]


def test_bad_words_need_their_whole_beginning_in_the_output():
    """(4, 5, 6) forbids 6 after output 4, 5 only: not when the 4 is the prompt's, nor after 5 alone."""
    params = SamplingParams(temperature=0, bad_words_ids=((4, 5, 6), (7,)))
    scores = [0, 0, 0, 0, 0, 0, 2.0, 3.0, 1.0]
    for prompt, output, expected in [
        ((1,), (4, 5), 8),
        ((4,), (5,), 6),
        ((1,), (5,), 6),
        ((1,), (4, 5, 0), 6),
        ((1,), (0, 4, 5), 8),
        ((4, 5), (), 6),
    ]:
        assert sample_one(admitted(params, prompt, output), scores).token_ids[0] == expected
        sampler = sampler_of(admitted(params, prompt), vocab=9)
        for token_id in output:
            sampler.accept(0, token_id)
        at = np.array([len(prompt) + len(output)])
        assert sampler.sample(scores_of(torch.tensor([scores])), np.array([0]), at).token_ids[0] == expected


def test_ids_outside_the_vocabulary_are_ignored():
    """Every wish that names ids takes those it knows and never reaches into a neighbour's row."""
    params = SamplingParams(
        logit_bias={4: 1.0, 10: 50.0, -1: 50.0},
        allowed_token_ids=(4, 5, 10, 99),
        bad_words_ids=((10,), (2, 99), (-3,), ()),
        min_tokens=1,
        temperature=0,
        repetition_penalty=2.0,
    )
    request = admitted(params, prompt=(1, 12), output=(11,), stop_ids={10, -5})
    sampler = sampler_of(request, admitted(SamplingParams(temperature=0)), vocab=10)
    scores = torch.zeros(2, 10)
    scores[1, 7] = 0.5
    assert sampler.sample(scores_of(scores), np.array([0, 1]), np.array([3, 3])).token_ids.tolist() == [4, 7]


def test_logprobs_are_of_the_scores_as_they_came():
    """Penalties, bias and temperature choose another token; its log probability is the model's own, with its rank."""
    scores = torch.tensor([1.0, 2.0, 3.0, 0.5])
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={0: 10.0})
    found = sample_one(admitted(params), scores).logprobs[0]
    logs = scores.log_softmax(0)
    assert found.token_ids == [0, 2, 1]
    assert found.logprobs == [float(logs[i]) for i in (0, 2, 1)]
    assert found.rank == 3
    none = sample_one(admitted(SamplingParams(temperature=0, logprobs=0)), scores).logprobs[0]
    assert (none.token_ids, none.rank) == ([2], 1)


def test_prompt_logprobs():
    """Per position the following token, then the best ones; by torch's log_softmax."""
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    following = np.array([3, 1, 4, 1, 5, 9])
    found = Sampler(1, 50).prompt_logprobs(scores, following, 3)
    logs = scores.log_softmax(1)
    for i, entry in enumerate(found):
        best = logs[i].topk(3)
        assert entry.token_ids == [following[i], *best.indices.tolist()]
        assert entry.logprobs == [float(logs[i, following[i]]), *best.values.tolist()]
        assert entry.rank == 1 + int((logs[i] > logs[i, following[i]]).sum())
    assert [entry.token_ids for entry in Sampler(1, 50).prompt_logprobs(scores, following, 0)] == [
        [i] for i in following.tolist()
    ]
    assert Sampler(1, 50).prompt_logprobs(scores[:0], following[:0], 3) == []


def test_a_row_that_cannot_be_sampled_fails_alone():
    """NaN, and constraints that leave nothing, name their reason; the other rows get their tokens and logprobs."""
    wanted = SamplingParams(logprobs=1)
    batch = [
        admitted(wanted),
        admitted(wanted, seed=8),
        admitted(SamplingParams(allowed_token_ids=(5,), bad_words_ids=((5,),)), seed=9),
        admitted(SamplingParams(temperature=0), seed=10),
    ]
    scores = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (4, VOCAB)).astype(np.float32))
    scores[1, 17] = torch.nan
    output = sampler_of(*batch).sample(scores_of(scores.clone()), np.arange(4), np.full(4, 3))
    assert set(output.failed) == {1, 2}
    assert "NaN" in output.failed[1]
    assert "allowed" in output.failed[2]
    assert output.token_ids[[1, 2]].tolist() == [0, 0]
    assert list(output.logprobs) == [0]
    for row in (0, 3):
        assert output.token_ids[row] == expected_token(batch[row], scores[row])


def test_a_released_slot_leaves_nothing_to_the_next():
    """The next request of a slot sees neither the wishes nor the tokens of the one before."""
    heavy = admitted(
        SamplingParams(temperature=0, logit_bias={2: 90.0}, frequency_penalty=2.0, logprobs=3, min_tokens=5),
        stop_ids={1},
    )
    plain = admitted(SamplingParams(temperature=0))
    sampler = sampler_of(heavy)
    sampler.accept(0, 2)
    sampler.release(0)
    sampler.admit(0, plain)
    sampler.accept(0, 2)
    scores = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
    output = sampler.sample(scores_of(scores.clone()), np.array([0]), np.array([4]))
    assert output.token_ids[0] == scores.argmax()
    assert output.logprobs == {}


def test_steps_of_the_same_rows():
    """Positions move on in place or come in a new array; another request in a slot, or other slots, are noticed."""
    batch = [admitted(SamplingParams(top_k=40), seed=i) for i in range(3)]
    sampler, rng = sampler_of(*batch), np.random.default_rng(8)
    slots, positions = np.arange(3), np.full(3, 3)
    for step in range(8):
        scores = torch.from_numpy(rng.normal(0, 1, (3, VOCAB)).astype(np.float32))
        if step == 3:
            positions = positions.copy()
        if step == 5:
            batch[1] = admitted(SamplingParams(temperature=0), prompt=[1] * int(positions[1]))
            sampler.release(1)
            sampler.admit(1, batch[1])
        if step == 6:
            slots = slots[::-1].copy()
        found = sampler.sample(scores_of(scores), slots, positions).token_ids.tolist()
        fresh = sampler_of(*batch).sample(scores_of(scores), slots.copy(), positions.copy()).token_ids.tolist()
        assert found == fresh
        positions += 1


def test_slots_in_any_order_and_an_empty_step():
    """Rows follow `slots`, not the order of admission; no rows are no work."""
    batch = [admitted(SamplingParams(top_k=40), seed=i) for i in range(5)]
    sampler = sampler_of(*batch)
    scores = torch.from_numpy(np.random.default_rng(6).normal(0, 1, (5, VOCAB)).astype(np.float32))
    slots = np.array([3, 0, 4, 1, 2], np.int32)
    tokens = sampler.sample(scores_of(scores[torch.from_numpy(slots)]), slots, np.full(5, 3, np.int32)).token_ids
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [expected_token(batch[slot], scores[slot]) for slot in slots.tolist()]
    assert sampler.sample(scores_of(scores[:0]), slots[:0], slots[:0]).token_ids.tolist() == []


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed):
    """Negative seeds stand for the same 64 bits; every bit matters."""
    scores = torch.zeros(VOCAB)
    params = SamplingParams()
    tokens = [
        int(sample_one(admitted(params, seed=s), scores).token_ids[0]) for s in (seed, seed % 2**64, seed ^ 2**40)
    ]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


def test_occurrences_grow_with_a_long_answer() -> None:
    found = Occurrences([900, 901], range(300))
    for _ in range(2):
        found.add(901)
    counts = dict(zip(found.ids.tolist(), found.counts.tolist(), strict=True))
    assert counts == {900: 0.0, 901: 2.0, **dict.fromkeys(range(300), 1.0)}
