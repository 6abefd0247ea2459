"""Position-keyed noise: Philox4x32-10 and the Gumbel variable of a token. Knows no scores and no requests.

The noise of a token is a pure function of (request seed, absolute position, token id): no state, no stream, so it does
not depend on who shares the batch, on chunking, preemption or retries.

Words. Key: (seed mod 2^32, seed div 2^32). Counter: (position mod 2^32, index, purpose, 0), where purpose says what
`index` and the result mean:

    FIRST  index = token id div 128: one draw for 128 neighbouring token ids. Output word 0 gives the time of the
           group's first arrival, the low 7 bits of word 1 say which of its tokens that is.
    REST   index = token id. Output word 0 gives how long after the group's first arrival this token arrives.

A word gives `u = ((word >> 8) + 0.5) * 2^-24` and the standard exponential `-log(u)`, both in float64: in float32 the
sum `2^24 - 1 + 0.5` rounds to 2^24, so one draw in 2^24 would be an infinite Gumbel variable and win over any score.

Why two draws. Token i is chosen by the largest `log p_i + gumbel_i`, which is the earliest of exponential arrival times
divided by p_i. The first of 128 standard exponentials is an exponential divided by 128 and belongs to each token with
equal chance; the others follow it after independent standard exponentials (they have no memory). So

    time_i = first_g / 128 + (0 if i is the first of its group else rest_i),      gumbel_i = -log(time_i)

are independent standard Gumbel variables, exactly as with one draw per token, and `-log(first_g / 128)` bounds 128 of
them at once: the sampler finds the same argmax while drawing for a few tokens instead of the whole vocabulary.

Every function takes numpy arrays or torch tensors (any device) and gives back the same kind, bit-equal but for the last
bit of the logarithm. Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Maddison et
al. 2014, "A* sampling" (bounding Gumbel noise by its maximum over a set).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FIRST, REST = 0, 1  # purposes: the third counter word
GROUP = 128  # neighbouring token ids that share a first arrival; a power of two
GROUP_BITS = GROUP.bit_length() - 1

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10

LARGEST_TIME = 25 * np.log(2.0) * (1 + 1 / GROUP)  # both words are 0: u = 2^-25
SMALLEST_TIME = 2.0**-25 / GROUP * (1 - 2.0**-20)  # the group's word is the largest: -log(1 - 2^-25), a little less
LOWEST_GUMBEL = float(-np.log(LARGEST_TIME)) - 1e-3  # no token has less than this
HIGHEST_GUMBEL = float(-np.log(SMALLEST_TIME)) + 1e-3  # nor more than this


def philox4x32_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four words of 32 bits from a counter of four words and a key of two: ten rounds, in plain integers.

    Source: Salmon et al. 2011, section 4; constants and test vectors of the Random123 library.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & WORD, (product0 >> 32) ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """`philox4x32_reference` of whole arrays, which may broadcast against each other. Exactness: E0.

    Arrays: numpy uint64 (at least one axis) or torch int64, values in [0, 2^32); the same kind comes back.
    Both wrap products to 64 bits; the bits above a word are cut where they would be multiplied, which also removes the
    sign that torch's shift draws in.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0) & WORD
        c2 = ((product0 >> 32) ^ c3 ^ k1) & WORD
        c1, c3 = product1, product0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1 & WORD, c2, c3 & WORD


def words(seeds: Any, positions: Any, index: Any, purpose: Any) -> tuple[Any, Any]:
    """Output words 0 and 1 of (seed, position, index, purpose), which broadcast: see the file's docstring.

    numpy: seeds uint64, the others integers, result uint64. torch (if index is a tensor): all int64, seeds as the same
    64 bits. A scalar counts as an array of length one.
    """
    given = (seeds, positions, index, purpose)
    key: Any
    counter: Any
    if isinstance(index, Tensor):
        key, *counter = (torch.atleast_1d(torch.as_tensor(a, dtype=torch.int64, device=index.device)) for a in given)
        zero: Any = torch.zeros(1, dtype=torch.int64, device=index.device)
    else:
        key, *counter = (np.atleast_1d(a).astype(np.uint64, copy=False) for a in given)
        zero = np.zeros(1, np.uint64)
    position, of, kind = counter
    result = philox4x32((position & WORD, of & WORD, kind, zero), (key & WORD, (key >> 32) & WORD))
    return result[0], result[1]


def exponential(word: Any) -> Any:
    """The standard exponential variable of a word: float64 `-log(((word >> 8) + 0.5) * 2^-24)`, in (2^-25, 17.4)."""
    if isinstance(word, Tensor):
        return -torch.log(((word >> 8).double() + 0.5) * 2.0**-24)
    return -np.log(((word >> 8).astype(np.float64) + 0.5) * 2.0**-24)


def first_arrivals(word0: Any, word1: Any) -> tuple[Any, Any]:
    """From the words of a FIRST draw: when the group's first token arrives (float64), which it is, in [0, GROUP)."""
    return exponential(word0) / GROUP, word1 & (GROUP - 1)


def gumbel_of(times: Any) -> Any:
    """float32 `-log(times)` of float64 arrival times: one rounding, so hardly ever apart between backends."""
    if isinstance(times, Tensor):
        return -torch.log(times).float()
    return -np.log(times).astype(np.float32)


def gumbel(seeds: Any, positions: Any, token_ids: Any) -> Any:
    """Standard Gumbel noise, float32, of tokens `token_ids` at absolute `positions` of requests with `seeds`.

    The arguments broadcast; their kinds are those of `words`. Token ids are those of the whole vocabulary also where it
    is sharded. Draws 2 Philox blocks per token: for many tokens of one position `nn/kernels/sampling.py` draws fewer.
    """
    times, first = first_arrivals(*words(seeds, positions, token_ids >> GROUP_BITS, FIRST))
    rest = exponential(words(seeds, positions, token_ids, REST)[0])
    return gumbel_of(times + rest * (first != (token_ids & (GROUP - 1))))
