from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.training.conftest import made_up_stories

from penstock.training.corpus import Document
from penstock.training.packing import NO_TARGET, RowStream, TokenSource, encode_documents, held_out_rows
from penstock.training.tokenizer import END_OF_TEXT, train_tokenizer


def source(name: str, first: int, lengths: list[int], weight: float, is_chat: bool, until: float = 1.0) -> TokenSource:
    """Documents of the given lengths with consecutive ids from `first` on, so that every token names its place."""
    total = sum(lengths)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return TokenSource(name, np.arange(first, first + total), np.zeros(total, bool), starts, is_chat, weight, until)


@pytest.mark.parametrize("seq_len", [8, 113, 200])
def test_texts_lose_nothing(seq_len: int) -> None:
    """With texts alone, every token is a target or opens a row, and a cut document goes on where it was cut."""
    lengths = [3, 50, 7, 1, 20, 33]
    stream = RowStream([source("a", 0, lengths, 1.0, False)], seed=1)
    rows = []
    while stream.epoch == 0:
        rows.append(stream.rows(1, seq_len))
    seen = {int(t) for ids, targets in rows for t in (ids[0, 0], *targets[0])}
    assert seen == set(range(sum(lengths)))
    starts = {0, 3, 53, 60, 61, 81}
    for (_, before), (after, _) in itertools.pairwise(rows):
        assert after[0, 0] == before[0, -1] or int(after[0, 0]) in starts


def test_no_row_begins_inside_a_chat() -> None:
    lengths = [5, 40, 13, 8]
    starts = set(np.concatenate(([0], np.cumsum(lengths)[:-1])).tolist())
    stream = RowStream([source("chat", 0, lengths, 1.0, True)], seed=2)
    for _ in range(50):
        ids, targets = stream.rows(2, 16)
        assert {int(i) for i in ids[:, 0]} <= starts
        assert np.array_equal(ids[:, 1:], targets[:, :-1])


def test_weights_and_ends_are_kept() -> None:
    """Over many epochs each source is read `weight` times an epoch, and not at all after its end."""
    sources = [
        source("a", 0, [4] * 10, 2.0, False),
        source("b", 100, [4] * 10, 0.5, False),
        source("c", 200, [4] * 10, 1.0, False, until=0.5),
    ]
    stream = RowStream(sources, seed=3)
    counts = np.zeros(300, int)
    while stream.epoch < 20:
        ids, _ = stream.rows(1, 39)
        np.add.at(counts, ids[0], 1)
    shares = counts[:100].sum() / counts[100:200].sum(), counts[:100].sum() / counts[200:].sum()
    assert shares == (pytest.approx(4, rel=0.1), pytest.approx(2, rel=0.1))
    assert np.ptp(counts[100:140:4]) <= 1  # a fractional weight takes every document in turn
    late = np.concatenate([stream.rows(1, 39, progress=0.5)[0] for _ in range(20)])
    assert late.max() < 200


def test_a_restored_stream_goes_on_alike() -> None:
    def fresh() -> RowStream:
        return RowStream([source("a", 0, [30, 3, 77], 1.5, False), source("b", 200, [9, 25], 0.7, True)], seed=4)

    stream = fresh()
    stream.rows(7, 16)
    state = stream.state()
    wanted = [stream.rows(3, 24) for _ in range(20)]
    again = fresh()
    again.restore(state)
    for ids, targets in wanted:
        new_ids, new_targets = again.rows(3, 24)
        assert np.array_equal(new_ids, ids) and np.array_equal(new_targets, targets)


def test_encoding_marks_silent_tokens_and_ends_documents() -> None:
    tokenizer = train_tokenizer(made_up_stories(), 384)
    head, rest = "<|im_start|>system\nBe é.<|im_end|>", "\n<|im_start|>user\nHi<|im_end|>"
    documents = [Document(head + rest, False, True, len(head)), Document("not here", True, True)]
    found = encode_documents("x", documents, tokenizer, 1.0, False)
    assert tokenizer.decode(found.ids.tolist(), skip_special_tokens=False) == head + rest + END_OF_TEXT
    assert tokenizer.decode(found.ids[found.silent].tolist(), skip_special_tokens=False) == head
    _, targets = RowStream([found], seed=1).rows(1, len(found.ids) - 1)
    assert (targets == NO_TARGET).sum() == found.silent.sum() - 1
    ids, targets = held_out_rows(found, 8, 100)
    assert ids.shape == targets.shape == (len(found.ids) // 9, 8)


def test_held_out_rows_pad_a_short_source_without_targets() -> None:
    ids, targets = held_out_rows(source("a", 5, [4], 0.0, False), 16, 10)
    assert ids.tolist() == [[5, 6, 7, 8] + [0] * 12]
    assert targets.tolist() == [[6, 7, 8] + [NO_TARGET] * 13]
