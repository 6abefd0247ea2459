"""The noise is Philox4x32-10 as published, standard Gumbel, independent between tokens, and the same on any array."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.nn.kernels import philox

PUBLISHED = [  # counter, key, words: philox4x32 with 10 rounds in the Random123 library's kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORDS = st.integers(0, 2**32 - 1)


def gumbel_in_plain_numbers(seed: int, position: int, token_id: int) -> float:
    """The file's definition, one token at a time, from the scalar reference."""
    key = (seed % 2**32, seed // 2**32)
    group, lane = divmod(token_id, 128)
    word0, word1, _, _ = philox.philox4x32_reference((position, group, 0, 0), key)
    time = -math.log(((word0 >> 8) + 0.5) * 2.0**-24) / 128
    if lane != word1 % 128:
        word0 = philox.philox4x32_reference((position, token_id, 1, 0), key)[0]
        time += -math.log(((word0 >> 8) + 0.5) * 2.0**-24)
    return -math.log(time)


def g_test(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the G statistic lies above what chance gives (Wilson and Hilferty 1931)."""
    assert observed.sum() == pytest.approx(expected.sum())
    seen = observed > 0
    g = 2 * float((observed[seen] * np.log(observed[seen] / expected[seen])).sum())
    freedom = observed.size - 1
    return ((g / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter, key, words):
    """The scalar reference and the array form, of either kind, give the words that Random123 publishes."""
    assert philox.philox4x32_reference(counter, key) == words
    arrays = philox.philox4x32(
        tuple(np.array([c], np.uint64) for c in counter), tuple(np.array([k], np.uint64) for k in key)
    )
    assert tuple(int(a[0]) for a in arrays) == words
    tensors = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(t[0]) for t in tensors) == words


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=20))
def test_arrays_equal_the_scalar_reference(rows):
    """Any counters and keys, numpy and torch: word for word the scalar reference."""
    expected = [philox.philox4x32_reference(row[:4], row[4:]) for row in rows]
    columns = np.array(rows, np.uint64).T
    assert np.stack(philox.philox4x32(tuple(columns[:4]), tuple(columns[4:])), 1).tolist() == [
        list(e) for e in expected
    ]
    columns = torch.tensor(rows).T
    assert torch.stack(philox.philox4x32(tuple(columns[:4]), tuple(columns[4:])), 1).tolist() == [
        list(e) for e in expected
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 2**20)), min_size=1, max_size=20
    )
)
def test_gumbel_is_what_the_docstring_defines(rows):
    """The noise of any (seed, position, token id) is the documented function of Philox words, on either array kind."""
    seeds, positions, token_ids = np.array([r[0] for r in rows], np.uint64), *np.array([r[1:] for r in rows]).T
    expected = np.array([gumbel_in_plain_numbers(*row) for row in rows]).astype(np.float32)
    found = philox.gumbel(seeds, positions, token_ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-7)
    tensors = philox.gumbel(*(torch.from_numpy(a) for a in (seeds.view(np.int64), positions, token_ids)))
    np.testing.assert_allclose(tensors.numpy(), found, rtol=2e-7, atol=1e-7)


def test_gumbel_does_not_depend_on_the_company():
    """One token's noise is bit-equal alone, in a long array, in a matrix, and after the arrays are reversed."""
    token_ids = np.arange(5000)
    together = philox.gumbel(np.uint64(11), 3, token_ids)
    assert (philox.gumbel(np.uint64(11), 3, token_ids[::-1])[::-1] == together).all()
    assert (philox.gumbel(np.uint64(11), np.array([[9], [3]]), token_ids[None])[1] == together).all()
    for token_id in (0, 1, 127, 128, 4093, 4999):
        assert philox.gumbel(np.uint64(11), 3, np.int64(token_id))[0] == together[token_id]


def test_extreme_words_are_finite_and_bounded():
    """No word gives an infinite variable, and the stated bounds hold at both ends."""
    words = np.array([0, 2**32 - 1], np.uint64)
    longest, shortest = philox.exponential(words)
    assert longest == pytest.approx(25 * math.log(2))
    assert shortest == pytest.approx(2.0**-25)
    first, _ = philox.first_arrivals(words, words)
    assert philox.LOWEST_GUMBEL < -math.log(first[0] + longest) < philox.LOWEST_GUMBEL + 0.01
    assert philox.HIGHEST_GUMBEL - 0.01 < -math.log(first[1]) < philox.HIGHEST_GUMBEL
    assert (philox.exponential(torch.tensor([0, 2**32 - 1])).numpy() == philox.exponential(words)).all()


def test_the_first_arrival_bounds_its_group():
    """In each group, the token that the FIRST draw names has exactly the bound, and no other has more."""
    seeds, groups = np.arange(40, dtype=np.uint64)[:, None], np.arange(50)
    arrival, first = philox.first_arrivals(*philox.words(seeds, 17, groups[None], philox.FIRST))
    bound = philox.gumbel_of(arrival)
    noise = philox.gumbel(seeds, 17, np.arange(50 * philox.GROUP)[None]).reshape(40, 50, philox.GROUP)
    assert (noise.max(2) == bound).all()
    assert (noise.argmax(2) == first).all()


def test_noise_is_standard_and_independent():
    """500 positions x 512 tokens: e^-noise is exponential (200 bins); so are the pairs of tokens inside a group, of the
    same token at neighbouring positions, and with neighbouring seeds (8 x 8 bins each), by G-tests."""
    times = np.exp(-philox.gumbel(np.uint64(5), np.arange(500)[:, None], np.arange(512)[None]).astype(np.float64))
    uniform = np.exp(-times)
    counts = np.histogram(uniform, 200, (0, 1))[0]
    assert g_test(counts, np.full(200, uniform.size / 200)) < 4
    other_seed = np.exp(
        -np.exp(-philox.gumbel(np.uint64(6), np.arange(500)[:, None], np.arange(512)[None]).astype(np.float64))
    )
    pairs = {
        "neighbours in a group": (uniform[:, :-1:2], uniform[:, 1::2]),
        "ends of a group": (uniform[:, :64], uniform[:, 127:63:-1]),
        "groups": (uniform[:, :256], uniform[:, 256:]),
        "positions": (uniform[:-1:2], uniform[1::2]),
        "seeds": (uniform, other_seed),
    }
    for name, (one, two) in pairs.items():
        table = np.histogram2d(one.ravel(), two.ravel(), 8, [[0, 1], [0, 1]])[0]
        assert g_test(table, np.full((8, 8), one.size / 64)) < 4, name
