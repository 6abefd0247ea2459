"""Mooncake traces: equal block ids give equal blocks, at any scale; what is no trace is refused by line."""

from __future__ import annotations

import gzip
import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.sim.trace import TraceError, block_tokens, read_mooncake


def row(time, length, ids, output=7):
    return {"timestamp": time, "input_length": length, "output_length": output, "hash_ids": ids}


def write(path, rows):
    text = "".join(json.dumps(r) + "\n" if isinstance(r, dict) else r for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
@pytest.mark.parametrize("scale", [1, 32, 512])
def test_equal_ids_give_equal_blocks(tmp_path, name, scale):
    path = write(tmp_path / name, [row(0, 1024, [3, 4]), row(0, 1100, [3, 5, 6]), row(3000, 100, [7])])
    a, b, c = read_mooncake(path, tokens_per_token=scale, vocab_size=1000)
    size = 512 // scale
    assert a.token_ids[:size] == b.token_ids[:size] and len(a.token_ids) == 2 * size
    assert scale == 512 or a.token_ids[size:] != b.token_ids[size : 2 * size]
    assert len(b.token_ids) == 1100 // scale and len(c.token_ids) == max(1, 100 // scale)
    assert (c.arrival_s, c.prompt_tokens, c.output_tokens) == (3.0, 100, 7)
    assert max(b.token_ids) < 1000
    assert len(read_mooncake(path, max_requests=2)) == 2


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.sampled_from([1, 16, 512]), st.integers(2, 2**30))
@settings(deadline=None)
def test_a_blocks_tokens_depend_on_its_id_alone(ids, size, vocab):
    tokens = block_tokens(ids, size, vocab)
    for n, id_ in enumerate(ids):
        assert tokens[n * size : (n + 1) * size] == block_tokens([id_], size, vocab)
    assert all(0 <= token < vocab for token in tokens)


def test_lumps_are_spread_towards_the_next(tmp_path):
    path = write(tmp_path / "t.jsonl", [row(0, 10, [1])] * 5 + [row(3000, 10, [1])] * 5 + [row(5000, 10, [1])] * 2)
    times = [r.arrival_s for r in read_mooncake(path, spread=Random(1))]
    assert times == sorted(times) and times[-2:] == [5.0, 5.0]
    assert all(0 <= t < 3 for t in times[:5]) and all(3 <= t < 5 for t in times[5:10]) and len(set(times)) == 11
    assert times == [r.arrival_s for r in read_mooncake(path, spread=Random(1))]


@pytest.mark.parametrize(
    "bad", ["nonsense\n", "[]\n", "{}\n", json.dumps(row(0, 600, [1])) + "\n", json.dumps(row(0, 0, [])) + "\n"]
)
def test_what_is_no_trace_is_refused_by_line(tmp_path, bad):
    with pytest.raises(TraceError, match="line 2"):
        read_mooncake(write(tmp_path / "t.jsonl", [row(0, 10, [1]), bad]))
    with pytest.raises(ValueError, match="divide"):
        read_mooncake(tmp_path / "t.jsonl", tokens_per_token=48)
