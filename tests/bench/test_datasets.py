"""Prompts and lengths that benchmarks ask for: made-up ones keep their promises, files are read as they are written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shared.tiny_tokenizers import byte_level

from penstock.bench.datasets import (
    WORDS,
    Vocabulary,
    custom_requests,
    prefix_repetition_requests,
    random_requests,
    sharegpt_requests,
    timed_trace_requests,
)
from penstock.config.values import ConfigError
from penstock.engine.tokenizer import Tokenizer

LARGE = Vocabulary(np.arange(7, 1 << 20), lambda ids: " ".join(map(str, ids)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level(), special_tokens={"eos_token": "<|endoftext|>"})


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 20),
    input_len=st.integers(1, 300),
    output_len=st.integers(1, 300),
    prefix_len=st.integers(0, 40),
    ratio=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_random_lengths_stay_in_their_range(
    num: int, input_len: int, output_len: int, prefix_len: int, ratio: float, seed: int
) -> None:
    def made() -> list[Any]:
        rng = np.random.default_rng(seed)
        options = {"input_len": input_len, "output_len": output_len, "prefix_len": prefix_len, "range_ratio": ratio}
        return random_requests(LARGE, num, rng, **options)

    requests = made()
    assert len(requests) == num
    prefixes = {tuple(request.token_ids[:prefix_len]) for request in requests}
    assert len(prefixes) == 1
    for request in requests:
        own = request.num_prompt - prefix_len
        assert request.num_prompt == len(request.token_ids)
        assert max(1, int(input_len * (1 - ratio))) <= own <= max(1, int(np.ceil(input_len * (1 + ratio))))
        assert max(1, int(output_len * (1 - ratio))) <= request.num_output <= int(np.ceil(output_len * (1 + ratio)))
        assert min(request.token_ids) >= 7
    assert made() == requests  # the seed decides everything


def test_a_ratio_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="--random-range-ratio"):
        random_requests(LARGE, 1, np.random.default_rng(0), range_ratio=1.0)


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 60), num_prefixes=st.integers(1, 12), prefix=st.integers(3, 20), suffix=st.integers(1, 20))
def test_each_prefix_is_repeated_equally_often(num: int, num_prefixes: int, prefix: int, suffix: int) -> None:
    options = {"prefix_len": prefix, "suffix_len": suffix, "num_prefixes": num_prefixes, "output_len": 5}
    rng = np.random.default_rng(0)
    if num < num_prefixes:
        with pytest.raises(ConfigError, match="num-prefixes"):
            prefix_repetition_requests(LARGE, num, rng, **options)
        return
    requests = prefix_repetition_requests(LARGE, num, rng, **options)
    counts: dict[tuple[int, ...], int] = {}
    for request in requests:
        assert len(request.token_ids) == prefix + suffix
        counts[tuple(request.token_ids[:prefix])] = counts.get(tuple(request.token_ids[:prefix]), 0) + 1
    assert list(counts.values()) == [num // num_prefixes] * num_prefixes
    assert len({tuple(request.token_ids) for request in requests}) == len(requests)


def test_the_vocabulary_holds_no_special_token(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary.of(tokenizer)
    specials = {i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)}
    assert specials
    assert not specials & set(vocabulary.ids.tolist())
    assert len(vocabulary.ids) + len(specials) == tokenizer.vocab_size
    assert max(Vocabulary.of(tokenizer, 100).ids) < 100
    ids = tokenizer.encode("hello there")
    assert vocabulary.text_of(ids) == "hello there"


def test_without_a_tokenizer_prompts_are_words() -> None:
    [request] = random_requests(Vocabulary.of_words(), 1, np.random.default_rng(0), input_len=50, output_len=3)
    assert request.token_ids is None
    assert request.num_prompt == 0  # nobody here can count them
    words = (request.text or "").split()
    assert len(words) == 50
    assert set(words) <= set(WORDS)


# ---- files ----


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


def trace_row(at: float, num_input: int, num_output: int, hash_ids: list[int]) -> dict[str, Any]:
    return {"timestamp": at, "input_length": num_input, "output_length": num_output, "hash_ids": hash_ids}


@settings(max_examples=50, deadline=None)
@given(
    paths=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=2, max_size=6),
    cut=st.integers(0, 15),
    scale=st.sampled_from([1.0, 0.5, 0.25, 2.0]),
)
def test_trace_prompts_share_exactly_the_blocks_the_trace_says(
    paths: list[list[int]], cut: int, scale: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Hash ids name a block and everything before it; prompts agree as far as their ids do, and no further."""
    names: dict[tuple[int, ...], int] = {}
    chains = [[names.setdefault(tuple(path[: n + 1]), len(names)) for n in range(len(path))] for path in paths]
    rows = [trace_row(10 * n, 16 * len(chain) - cut, 4, chain) for n, chain in enumerate(chains)]
    path = write_lines(tmp_path_factory.mktemp("trace") / "t.jsonl", rows)
    requests = timed_trace_requests(path, LARGE, None, 3, block_size=16, length_scale=scale)
    block = int(16 * scale)
    for row, request in zip(rows, requests, strict=True):
        assert request.num_prompt == len(request.token_ids or ()) == max(1, round(row["input_length"] * scale))
        assert request.num_output == max(1, round(4 * scale))
    for one, first in zip(chains, requests, strict=True):
        for other, second in zip(chains, requests, strict=True):
            num_shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            a, b = first.token_ids or [], second.token_ids or []
            both = min(len(a), len(b))
            wanted = both if num_shared is None else min(both, num_shared * block)
            assert a[:wanted] == b[:wanted]
            if wanted < both:
                assert a[wanted : wanted + block] != b[wanted : wanted + block]


def test_trace_times_are_in_order_and_scaled(tmp_path: Path) -> None:
    rows = [trace_row(5000, 8, 2, [1]), trace_row(3000, 8, 2, [2]), trace_row(9000, 8, 2, [-(2**63) + 5])]
    requests = timed_trace_requests(write_lines(tmp_path / "t.jsonl", rows), LARGE, None, 0, block_size=8, speed=4)
    assert [request.at_s for request in requests] == [0.0, 0.5, 1.5]
    two = timed_trace_requests(str(tmp_path / "t.jsonl"), LARGE, 2, 0, block_size=8)
    assert [request.at_s for request in two] == [0.0, 2.0]


def test_a_trace_without_hashes_shares_nothing(tmp_path: Path) -> None:
    rows = [{"timestamp": 0, "input_length": 30, "output_length": 1}] * 3
    requests = timed_trace_requests(write_lines(tmp_path / "t.jsonl", rows), LARGE, None, 0)
    assert len({tuple(request.token_ids or ()) for request in requests}) == 3


def test_a_wrong_block_size_is_refused_not_cut(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [trace_row(0, 1000, 1, [1, 2])])
    with pytest.raises(ConfigError, match=r"line 1 .*2 blocks of 16 tokens do not cover"):
        timed_trace_requests(path, LARGE, None, 0, block_size=16)


@pytest.mark.parametrize(
    ("rows", "said"),
    [([{"timestamp": 0}], "line 1"), ([], "holds no request"), ([trace_row(0, 8, 1, [0]), 7], "line 2")],
)
def test_broken_traces_name_the_line(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        timed_trace_requests(write_lines(tmp_path / "t.jsonl", rows), LARGE, None, 0)


@pytest.mark.shared
def test_mooncakes_own_trace(shared_dir: Path) -> None:
    path = shared_dir / "data" / "traces" / "mooncake_conversation_0-30min.jsonl.gz"
    requests = timed_trace_requests(str(path), LARGE, 50, 0, length_scale=1 / 64)
    with gzip.open(path, "rt") as file:
        rows = [json.loads(next(file)) for _ in range(50)]
    assert [request.num_prompt for request in requests] == [max(1, round(r["input_length"] / 64)) for r in rows]
    assert requests[-1].at_s == pytest.approx(rows[-1]["timestamp"] / 1000)


def conversation(*turns: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": turn} for turn in turns]}


def test_sharegpt_takes_first_turns_of_usable_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = [
        ("what is the capital of the city", "it is the place where people live and work"),
        ("a b c d e f", "g " * 9),
    ]
    rows = [conversation(*pair) for pair in good]
    rows += [conversation("hi"), conversation("x" * 9000, "a long prompt is left out"), {"other": 1}]
    path = tmp_path / "share.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    requests = sharegpt_requests(str(path), tokenizer, 5, np.random.default_rng(0))
    assert len(requests) == 5  # two usable ones, repeated
    assert {request.text for request in requests} == {prompt for prompt, _ in good}
    lengths = {prompt: len(tokenizer.encode(answer, add_special_tokens=False)) for prompt, answer in good}
    assert all(request.num_output == lengths[request.text or ""] for request in requests)
    rng = np.random.default_rng(0)
    few = sharegpt_requests(str(path), tokenizer, 5, rng, output_len=7, oversample=False)
    assert [request.num_output for request in few] == [7, 7]


def test_custom_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"line {n}", "output_tokens": n + 1} for n in range(4)]
    path = write_lines(tmp_path / "c.jsonl", rows)
    rng = np.random.default_rng(0)
    requests = custom_requests(path, tokenizer, 3, rng, output_len=-1, shuffle=False)
    assert [(request.text, request.num_output) for request in requests] == [("line 0", 1), ("line 1", 2), ("line 2", 3)]
    assert requests[0].num_prompt == len(tokenizer.encode("line 0"))
    shuffled = custom_requests(path, None, 4, rng, output_len=9)
    assert {request.text for request in shuffled} == {row["prompt"] for row in rows}
    with pytest.raises(ConfigError, match="line 1"):
        custom_requests(write_lines(tmp_path / "d.jsonl", [{"text": "x"}]), None, 1, rng)
    with pytest.raises(ConfigError, match="cannot read"):
        custom_requests(str(tmp_path / "none.jsonl"), None, 1, rng)
    (tmp_path / "e.jsonl").write_text("{not json", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSONL"):
        custom_requests(str(tmp_path / "e.jsonl"), None, 1, rng)
