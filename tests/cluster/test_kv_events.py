"""vLLM's event format: what we write is what vLLM writes, byte for byte; what it writes, old and new, we read."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.kv_events import END_OF_REPLAY, FormatError, decode, encode, replay, sixteen
from penstock.core.kv_events import KVChange, KVEvents, KVEventSource, StoredTokens

pack = msgspec.msgpack.encode
A, B, C = (hashlib.blake2b(name, digest_size=16).digest() for name in (b"a", b"b", b"c"))
hashes = st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=5).map(tuple)
tokens = st.none() | st.builds(
    StoredTokens, st.none() | st.binary(min_size=16, max_size=16),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=9).map(tuple), st.integers(1, 64),
)  # fmt: skip
tiers = st.sampled_from(["device", "host", "disk"])
changes = st.builds(KVChange, st.just(True), tiers, hashes, tokens) | st.builds(KVChange, st.just(False), tiers, hashes)


def frames_of(events, seq=0):
    return [b"", seq.to_bytes(8, "big"), pack(events)]


@given(st.lists(changes, max_size=6).map(tuple), st.integers(0, 2**40))
@settings(deadline=None)
def test_what_is_written_is_read(told, seq):
    assert decode(encode(KVEvents("e", 3, seq, told), 1.5, "kv"), "e", 3) == KVEvents("e", 3, seq, told)


def test_the_layout_is_vllms():
    """Maps with their type, in a batch that is an array; defaults left out. Written by hand from vLLM's definitions."""
    stored = KVChange(True, "device", (A, B), StoredTokens(C, (1, 2, 3, 4), 2))
    frames = encode(
        KVEvents("e", 0, 7, (stored, KVChange(False, "host", (A,)), KVChange(False, "device", ()))), 2.5, "t", 1
    )
    assert frames[:2] == [b"t", b"\0\0\0\0\0\0\0\x07"]
    assert msgspec.msgpack.decode(frames[2]) == [
        2.5,
        [
            {
                "type": "BlockStored", "block_hashes": [A, B], "parent_block_hash": C, "token_ids": [1, 2, 3, 4],
                "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None,
            },
            {"type": "BlockRemoved", "block_hashes": [A], "medium": "CPU"},
            {"type": "AllBlocksCleared"},
        ],
        1,
    ]  # fmt: skip


def test_engines_of_every_age_are_understood():
    """Arrays and maps, hashes as numbers and as 32 bytes, fields that came later, events nobody knows."""
    long_hash = bytes(range(32))
    batch = [
        1.0,
        [
            ["BlockStored", [5, 6], None, [1, 2], 1, None],
            ["BlockRemoved", [5]],
            {
                "type": "BlockStored",
                "block_hashes": [long_hash],
                "parent_block_hash": A,
                "token_ids": [],
                "block_size": 16,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None],
                "group_idx": 0,
                "session_id": "s",
            },
            {
                "type": "BlockStored",
                "block_hashes": [A],
                "parent_block_hash": None,
                "token_ids": [],
                "block_size": 16,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "group_idx": 1,
            },
            {"type": "SomethingNew", "x": 1},
            ["AllBlocksCleared"],
        ],
    ]
    told = decode(frames_of(batch, 9), "v").changes
    assert told[0] == KVChange(True, "device", (sixteen(5), sixteen(6)), StoredTokens(None, (1, 2), 1))
    assert told[1] == KVChange(False, "device", (sixteen(5),))
    assert told[2] == KVChange(True, "device", (long_hash[:16],))
    assert [(c.stored, c.tier, c.hashes) for c in told[3:]] == [(False, t, ()) for t in ("device", "host", "disk")]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"", b"123", b""],
        [b"", bytes(8), b"\xc1"],
        frames_of("text"),
        frames_of([1.0, [[]]]),
        frames_of([1.0, [5]]),
        frames_of([1.0, [["BlockStored", "no list", None, [], 1, None]]]),
        frames_of([1.0, [{"type": "BlockRemoved"}]]),
        frames_of([1.0, [[["x"]]]]),
    ],
)
def test_what_is_no_batch_is_refused_by_name(frames):
    with pytest.raises(FormatError, match="engine-7"):
        decode(frames, "engine-7")


def test_missed_batches_are_told_again():
    kept = [(n, pack(n)) for n in range(5)]
    answers = replay(kept, [b"client", b"", (3).to_bytes(8, "big")], "kv")
    assert answers[:-1] == [[b"client", b"", b"kv", n.to_bytes(8, "big"), pack(n)] for n in (3, 4)]
    assert answers[-1] == [b"client", b"", b"", END_OF_REPLAY, b""]
    with pytest.raises(FormatError):
        replay(kept, [b"client", b""])


def test_an_engine_that_tells_tokens_joins_the_blocks_of_a_chain():
    source = KVEventSource("e", 0, list, with_tokens=True)
    source.describe(A, None, [1, 2])
    source.stored(A)
    source.describe(B, A, [3, 4])
    source.stored(B)
    source.describe(C, A, [5, 6])  # another branch
    source.stored(C)
    source.stored(sixteen(1), "device")  # nobody said what it holds
    told = source.take(0.0).changes
    assert [(c.hashes, c.tokens) for c in told] == [
        ((A, B), StoredTokens(None, (1, 2, 3, 4), 2)),
        ((C,), StoredTokens(A, (5, 6), 2)),
        ((sixteen(1),), None),
    ]
