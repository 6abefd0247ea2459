"""What benchmarks/pd_faults.py calls wrong: each check can fail. (The faults: tests/e2e/test_pd_faults.py.)"""

from __future__ import annotations

import random

import pytest
from benchmarks.pd_faults import Stream, breach, draw_streams

TOKENS = [5, 6, 7]


def stream(**seen: object) -> Stream:
    found = Stream([1, 2], {})
    for name, value in seen.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    "seen",
    [
        {"got": TOKENS, "finish_reason": "length"},
        {"got": [5, 6], "has_left": True},
        {"got": [5], "errors": ["server_error: 3 engines ended"]},
        {"errors": ["503 nobody is left"]},
    ],
)
def test_what_may_be_seen(seen: dict[str, object]) -> None:
    assert breach(stream(**seen), TOKENS) is None


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"got": [5, 6], "finish_reason": "length"}, "2 of 3 tokens"),
        ({"got": [5, 5, 6, 7], "finish_reason": "length"}, "wrong from 1 on"),
        ({"got": TOKENS, "finish_reason": None}, "finish reason None"),
        ({"got": [6], "has_left": True}, "wrong tokens"),
        ({"got": [5], "errors": ["a: b", "c: d"]}, "2 errors"),
        ({"got": [6], "errors": ["server_error: x"]}, "wrong tokens before it"),
        ({"got": [5], "errors": ["connection: reset"]}, "connection"),
    ],
)
def test_what_may_not_be_seen(seen: dict[str, object], words: str) -> None:
    assert words in str(breach(stream(**seen), TOKENS))


def test_a_run_is_a_function_of_its_seed() -> None:
    first, second = (draw_streams(random.Random("0/3"), 8) for _ in range(2))
    assert first == second
    assert all(100 <= len(each.token_ids) <= 1700 for each in first)
