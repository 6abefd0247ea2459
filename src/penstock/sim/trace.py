"""Requests to replay: the Mooncake traces, with token ids made up so that equal block ids give equal blocks.

Knows the files' format. Source: Qin et al. 2025, "Mooncake" (FAST'25 traces).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

TRACE_BLOCK = 512  # tokens of a block in the files


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `token_ids` may be a scaled-down prompt: each stands for `prompt_tokens / len(token_ids)` tokens."""

    id: str
    arrival_s: float
    token_ids: tuple[int, ...]
    prompt_tokens: int  # as recorded
    output_tokens: int


class TraceError(ValueError):
    """A file is not a trace. Names file and line."""


def read_mooncake(
    path: str | Path,
    *,
    tokens_per_token: int = 1,
    vocab_size: int = 1 << 30,
    max_requests: int | None = None,
    spread: Random | None = None,
) -> list[TraceRequest]:
    """The requests of a JSON-lines file, packed or not, in order of arrival. Raises TraceError.

    `tokens_per_token` divides lengths: it must divide 512, so that a block of the trace is one of `512 /
    tokens_per_token` tokens. Times are recorded in lumps (every 3 s in the conversation trace): with `spread`, each is
    moved evenly at random towards the next lump.
    """
    if TRACE_BLOCK % tokens_per_token:
        raise ValueError(f"tokens_per_token must divide {TRACE_BLOCK}, got {tokens_per_token}")
    path = Path(path)
    packed = path.read_bytes()
    text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode()
    rows = list(_rows(text.splitlines(), path, max_requests))
    times = _spread([row["timestamp"] / 1000 for row in rows], spread)
    size = TRACE_BLOCK // tokens_per_token
    requests = []
    for n, (row, time) in enumerate(zip(rows, times, strict=True)):
        length = max(1, row["input_length"] // tokens_per_token)
        ids = block_tokens(row["hash_ids"], size, vocab_size)[:length]
        requests.append(TraceRequest(f"t{n}", time, tuple(ids), row["input_length"], row["output_length"]))
    return sorted(requests, key=lambda request: request.arrival_s)


def block_tokens(block_ids: Sequence[int], block_size: int, vocab_size: int) -> list[int]:
    """Token ids of some blocks: a pure function of each block's id (the mixer of splitmix64)."""
    with np.errstate(over="ignore"):
        first = np.array(block_ids, np.uint64) * np.uint64(block_size)
        x = np.asarray(np.add.outer(first, np.arange(block_size, dtype=np.uint64)), np.uint64)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return [int(token) for token in ((x ^ (x >> np.uint64(31))) % np.uint64(vocab_size)).ravel()]


def _rows(lines: Iterable[str], path: Path, limit: int | None) -> Iterable[dict[str, Any]]:
    for n, line in enumerate(lines):
        if n == limit:
            return
        try:
            row = json.loads(line)
            blocks = -(-row["input_length"] // TRACE_BLOCK)
            if row["input_length"] < 1 or len(row["hash_ids"]) != blocks or row["timestamp"] < 0:
                raise ValueError(f"{row['input_length']} tokens, {len(row['hash_ids'])} blocks")
            row["output_length"] = int(row["output_length"])
        except (ValueError, TypeError, KeyError) as error:
            raise TraceError(f"{path}, line {n + 1}: not a request of a Mooncake trace: {error}") from error
        yield row


def _spread(times: list[float], random: Random | None) -> list[float]:
    if random is None:
        return times
    distinct = sorted(set(times))
    following = dict(zip(distinct, [*distinct[1:], distinct[-1] if distinct else 0.0], strict=True))
    return [time + random.random() * (following[time] - time) for time in times]
