"""Dealing one step's prompt chunks over the ranks of a data-parallel engine, so that none waits long for the others.

Pure. Source: longest processing time first (Graham 1969), under DeepSeek's two aims: equal attention, equal tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """`num_tokens` of a prompt of which `prefix` are computed."""

    num_tokens: int
    prefix: int

    def cost(self, token: float, attended: float) -> float:
        """In the unit of its two factors."""
        return self.num_tokens * (token + attended * (self.prefix + self.num_tokens / 2))


def deal_chunks(
    chunks: Sequence[Chunk], num_ranks: int, *, token: float, attended: float, slack_tokens: int
) -> list[list[int]]:
    """Indices of chunks per rank. Costliest first, each to the rank with the least cost so far.

    A rank that would get more than its even share of tokens, plus `slack_tokens` (a block), is passed over while
    another has room; where none has, the rank with the fewest tokens takes it, for a chunk is never cut here.
    """
    share = -(-sum(chunk.num_tokens for chunk in chunks) // num_ranks) + slack_tokens
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens, costs = [0] * num_ranks, [0.0] * num_ranks
    for i in sorted(range(len(chunks)), key=lambda i: (-chunks[i].cost(token, attended), i)):
        room = [r for r in range(num_ranks) if tokens[r] + chunks[i].num_tokens <= share]
        if room:
            rank = min(room, key=lambda r: (costs[r], tokens[r], r))
        else:
            rank = min(range(num_ranks), key=lambda r: (tokens[r], costs[r], r))
        ranks[rank].append(i)
        tokens[rank] += chunks[i].num_tokens
        costs[rank] += chunks[i].cost(token, attended)
    return ranks
