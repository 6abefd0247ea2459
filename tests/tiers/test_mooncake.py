"""Mooncake Store as a remote tier, against a real master where there is one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tests.ports import free_port
from tests.tiers.mooncake_master import Master
from tests.tiers.tier_blocks import ONE, TWO, key, record

from penstock.tiers import mooncake
from penstock.tiers.mooncake import MooncakeStore, parse
from penstock.tiers.record import RecordFormat

FORMAT = RecordFormat.of(ONE.groups[0])


@pytest.fixture
def master() -> Iterator[Master]:
    made = Master()
    yield made
    made.stop()


@pytest.fixture
def open_store(master: Master) -> Iterator[Callable[..., MooncakeStore]]:
    """The first store lends memory; all are closed while the master is there."""
    stores: list[MooncakeStore] = []

    def make(layout=ONE, namespace: str = "", lend: str = "64M") -> MooncakeStore:
        stores.append(MooncakeStore(master.url("" if stores else lend), layout, namespace))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def put(store: MooncakeStore, *numbers: int) -> list[bool]:
    return store.write([key(n) for n in numbers], [record(FORMAT, key(n)).data for n in numbers])


def get(store: MooncakeStore, *numbers: int) -> list[bool]:
    """Reads; what is said to be there must be the block, and no other buffer is touched."""
    buffers = [np.zeros(FORMAT.num_bytes, np.uint8) for _ in numbers]
    found = store.read([key(n) for n in numbers], [buffer.data for buffer in buffers])
    for n, ok, buffer in zip(numbers, found, buffers, strict=True):
        assert FORMAT.is_whole(buffer, key(n)) if ok else not buffer.any()
    return found


def test_blocks_are_shared(open_store: Callable[..., MooncakeStore]) -> None:
    """Two stores of one layout see the same blocks, in memory that one of them lends; another layout or namespace sees
    none; what was deleted is gone, read or not."""
    mine, theirs = open_store(), open_store()
    numbers = range(40)  # more than one batch
    assert put(mine, *numbers) == [True] * 40
    assert put(theirs, 1) == [True]  # it is there: that is as good
    assert get(theirs, *numbers, 99) == [True] * 40 + [False]
    assert theirs.find([key(3), key(99)]) == [True, False]
    for other in (open_store(TWO), open_store(ONE, "rank 1 of 2")):
        assert other.find([key(3)]) == [False]
        assert other.error is None
    theirs.delete([key(3), key(99)])
    assert get(mine, 2, 3) == [True, False]
    assert mine.error is None and theirs.error is None


def test_a_damaged_or_foreign_value_is_a_miss_and_makes_room(open_store: Callable[..., MooncakeStore]) -> None:
    store = open_store()
    assert put(store, 3) == [True]
    damaged = record(FORMAT, key(1))
    damaged[-100] ^= 4
    first, second = store._names([key(1), key(2)])
    assert store._client.put(first, damaged.tobytes()) == 0
    assert store._client.put(second, b"short") == 0
    assert get(store, 1, 2, 3) == [False, False, True]
    assert store.num_bad == 2 and store.error is None
    assert store.find([key(1), key(2), key(3)]) == [False, False, True]
    assert put(store, 1, 2) == [True, True] and get(store, 1, 2) == [True, True]


def test_what_is_not_whole_is_not_stored(open_store: Callable[..., MooncakeStore]) -> None:
    store = open_store()
    bad = record(FORMAT, key(1))
    bad[-100] ^= 1
    assert store.write([key(1)], [bad.data]) == [False]
    assert store.write([key(1), key(2)], [bad.data, record(FORMAT, key(2)).data]) == [False, True]
    assert store.find([key(1), key(2)]) == [False, True]


def test_where_nobody_lends_memory_it_says_so(open_store: Callable[..., MooncakeStore]) -> None:
    store = open_store(lend="0")
    assert put(store, 1, 2) == [False, False]
    assert store.error is not None and "?lend=SIZE" in store.error
    assert get(store, 1) == [False] and store.error is None


def test_a_master_that_goes_and_comes_back(master: Master) -> None:
    """Each call ends soon with an error that names it; then the tier works again, as a new one: its blocks are gone."""
    store = MooncakeStore(master.url("64M"), ONE)
    assert put(store, 1) == [True]
    master.stop()
    begin = time.monotonic()
    assert get(store, 1, 2) == [False, False]
    assert store.error is not None and str(master.port) in store.error
    assert time.monotonic() - begin < 15
    begin = time.monotonic()
    assert put(store, 3) == [False] and store.find([key(1)]) == [False]
    store.delete([key(1)])
    assert store.error is not None
    assert time.monotonic() - begin < 5  # it looks before it calls
    master.start()
    until_s = time.monotonic() + 30
    while put(store, 4) != [True]:
        assert time.monotonic() < until_s, store.error
        time.sleep(0.2)
    assert get(store, 4) == [True]
    store.close()


def test_a_master_that_is_not_there() -> None:
    """The library alone would try for minutes."""
    try:
        store = MooncakeStore(f"mooncake://127.0.0.1:{free_port()}", ONE)
    except ImportError as error:
        pytest.skip(str(error))
    begin = time.monotonic()
    assert store.find([key(1)]) == [False] and put(store, 1) == [False] and get(store, 1) == [False]
    assert store.error is not None and "refused" in store.error
    assert time.monotonic() - begin < 5
    store.close()


def test_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("mooncake://host:50051") == ("host", 50051, 0)
    assert parse("mooncake://[::1]:50051?lend=2GiB") == ("::1", 50051, 2 << 30)
    for url in (
        "mooncake://host", "mooncake://:1", "redis://host:1", "mooncake://host:1/db", "mooncake://host:x",
        "mooncake://host:1?lend=much", "mooncake://host:1?borrow=1G", "mooncake://user@host:1", "mooncake://host:99999",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="mooncake://host:port"):
            parse(url)
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ImportError, match=r"pip install 'penstock\[mooncake-cpu\]'"):
        mooncake.load()
