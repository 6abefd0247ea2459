"""Pools of two machines over real sockets: what comes is the block that was asked for, or nothing, whatever happens."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from tests.ports import free_port
from tests.tiers.test_driver import Machine, disk, hashes
from tests.tiers.tier_blocks import ONE, TWO, key, record

from penstock.cluster import pool_listener
from penstock.cluster.pool_frames import Find, Get, RecordLine, pool_identity
from penstock.cluster.pool_listener import PoolListener
from penstock.cluster.pool_store import PeerStore
from penstock.core.kv_pool import KVPool
from penstock.core.tiering import WRITE_THROUGH, Filled, Reserve, TierSettings
from penstock.tiers.arena import Arena
from penstock.tiers.disk import DiskStore
from penstock.tiers.driver import PoolDriver
from penstock.tiers.record import RecordFormat
from penstock.transfer.streams import Greeting

FORMAT = RecordFormat.of(ONE.groups[0])
SECRET = "open sesame"
ANYWHERE = "tcp://127.0.0.1:0"


class PeerPool:
    """Another machine's pool: driver and listener, with the thread that a pool's process would be."""

    def __init__(self, stores=None, host_blocks=64, layout=ONE, secret=SECRET, address=ANYWHERE) -> None:
        groups = len(layout.groups)
        sizes = [RecordFormat.of(group).num_bytes for group in layout.groups]
        stores = stores or {}
        tiers = [TierSettings(n, getattr(s, "num_blocks", None), WRITE_THROUGH) for n, s in stores.items()]
        self.arena = Arena.private(layout, (host_blocks,) * groups)
        self.pool = KVPool(sizes, (host_blocks,) * groups, tiers)
        self.woken = threading.Event()
        self.driver = PoolDriver(self.pool, self.arena, stores, self.woken.set)
        self.listener = PoolListener(
            address, pool_identity("the other pool", layout, secret), self.arena, self.woken.set
        )
        self.stops = self.sleeps = False
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return self.listener.address

    def _run(self) -> None:
        while not self.stops:
            self.woken.wait(0.01)
            self.woken.clear()
            if not self.sleeps:
                with self.lock:
                    self.turn()

    def turn(self) -> None:
        now = time.monotonic()
        self.listener.turn(self.driver, now)
        for to, answer in self.driver.poll(now):
            self.listener.deliver(to, answer)

    def put(self, *numbers: int) -> None:
        """As an engine of that machine saves blocks."""
        keys = tuple(key(n) for n in numbers)
        costs_s = (0.01,) * len(keys)
        wish, now = Reserve(numbers[0], keys, (b"",) * len(keys), costs_s), time.monotonic()
        with self.lock:
            [(_, answer)] = self.driver.handle("engine", wish, now)
            for name, slot in zip(keys, answer.slots, strict=True):
                if slot:
                    self.arena.record(0, slot)[:] = record(FORMAT, name)
            self.driver.handle("engine", Filled(numbers[0], tuple(map(bool, answer.slots))), now)

    def until(self, condition) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self) -> None:
        self.stops = True
        self.woken.set()
        self.thread.join(10)
        self.listener.close()
        self.driver.close()


@contextmanager
def peer(**settings) -> Iterator[PeerPool]:
    pool = PeerPool(**settings)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def store_at(address: str, layout=ONE, secret=SECRET, timeout_s=5.0) -> Iterator[PeerStore]:
    store = PeerStore(address, layout, secret, timeout_s)
    try:
        yield store
    finally:
        store.close()


def get(store, *numbers) -> list[bool]:
    """Reads; what is said to be there must be the block."""
    buffers = [np.zeros(FORMAT.num_bytes, np.uint8) for _ in numbers]
    found = store.read([key(n) for n in numbers], [buffer.data for buffer in buffers])
    for n, ok, buffer in zip(numbers, found, buffers, strict=True):
        assert not ok or FORMAT.is_whole(buffer, key(n))
    return found


def put(store, *numbers) -> list[bool]:
    return store.write([key(n) for n in numbers], [record(FORMAT, key(n)).data for n in numbers])


def test_blocks_come_and_go():
    with peer() as other, store_at(other.address) as store:
        other.put(*range(1, 11))
        assert store.find([key(3), key(99)]) == [True, False]
        assert get(store, *range(1, 13)) == [True] * 10 + [False] * 2
        assert put(store, 8, 20, 21) == [True] * 3, "the first was there already"
        assert store.find([key(20), key(21)]) == [True, True]
        assert get(store, 21, 5) == [True, True]
        assert store.error is None and store.num_bad == 0
        other.until(lambda: not other.pool.num_held)


def test_what_is_not_whole_is_neither_sent_nor_kept():
    with peer() as other, store_at(other.address) as store:
        bad = record(FORMAT, key(1))
        bad[-100] ^= 1
        assert store.write([key(1), key(2)], [bad.data, record(FORMAT, key(2)).data]) == [False, True]
        store._is_whole = lambda *_: True  # a peer that does not look
        assert store.write([key(1), key(3)], [bad.data, record(FORMAT, key(3)).data]) == [False, True]
        assert store.find([key(1), key(2), key(3)]) == [False, True, True]


def test_flipped_bits_in_the_peers_memory_are_a_miss():
    with peer() as other, store_at(other.address) as store:
        other.put(1, 2, 3)
        other.arena.record(0, other.pool.host[0].get(key(2)).slot)[-70] ^= 8
        assert get(store, 1, 2, 3) == [True, False, True]
        assert store.num_bad == 1 and store.error is None


def test_a_slot_that_was_given_away_meanwhile_is_a_miss():
    """A lease that ended while the peer's records were on their way: another block moves in."""
    with peer() as other, store_at(other.address) as store:
        other.put(1, 2)
        other.arena.record(0, other.pool.host[0].get(key(2)).slot)[:] = record(FORMAT, key(7))
        assert get(store, 1, 2) == [True, False]


def test_more_than_the_peer_has_room_for():
    with peer(host_blocks=4) as other, store_at(other.address) as store:
        assert sum(put(store, *range(1, 11))) <= 4
        assert sum(put(store, *range(20, 23))) == 3, "older ones went"
        other.until(lambda: not other.pool.num_held)


def test_what_the_peer_has_on_disk(tmp_path):
    with (
        peer(stores={"disk": DiskStore(tmp_path, ONE, 4 << 20, 200_000)}, host_blocks=4) as other,
        store_at(other.address) as store,
    ):
        for n in range(1, 13, 3):
            other.put(n, n + 1, n + 2)
            other.until(lambda: not other.pool._jobs)
        assert store.find([key(1), key(12)]) == [True, True]
        assert get(store, 1, 2, 3) == [True] * 3
        assert other.pool.lower[0].counts.num_read == 3


def test_wrong_secret_layout_or_version_is_refused_and_both_are_named(caplog):
    with peer() as other:
        for layout, secret, what in ((ONE, "wrong", "secret"), (TWO, SECRET, TWO.format)):
            with store_at(other.address, layout, secret) as store:
                assert store.find([key(1)]) == [False]
                assert "the other pool" in store.error and "the KV pool of" in store.error, store.error
                assert what in store.error and other.address in store.error
        with store_at(other.address) as store:
            store._identity = pool_identity("an old pool", ONE, SECRET)
            old = store._identity.format.replace("pool 1", "pool 0")
            store._identity = type(store._identity)("an old pool", old, SECRET.encode())
            assert store.find([key(1)]) == [False]
            assert "pool 0" in store.error and "pool 1" in store.error and "an old pool" in store.error
        assert not other.pool.peers


def test_a_peer_that_comes_back_is_found_again():
    with peer() as other, store_at(other.address) as store:
        other.put(1)
        assert get(store, 1) == [True]
        address = other.address
        other.listener.close()
        other.listener = PoolListener(
            address, pool_identity("the other pool", ONE, SECRET), other.arena, other.woken.set
        )
        assert get(store, 1) == [True] and store.error is None, "a new connection, and no pause"
        other.listener.close()
        assert get(store, 1, 2) == [False, False] and address in store.error


def test_a_peer_that_stalls_is_given_up_and_then_served_again(monkeypatch):
    monkeypatch.setattr(pool_listener, "ANSWER_S", 0.3)
    with peer() as other, store_at(other.address, timeout_s=0.2) as store:
        other.put(1)
        assert get(store, 1) == [True]
        other.sleeps = True
        begin = time.monotonic()
        assert get(store, *range(1, 50)) == [False] * 49
        assert store.error is not None and time.monotonic() - begin < 5
        other.sleeps = False
        assert get(store, 1) == [True] and store.error is None
        other.until(lambda: not other.pool.num_held)


class Crooked:
    """A peer that greets as it should and then says what the test wants."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.sock.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            with sock:
                Greeting(sock, pool_identity("a crooked pool", ONE, SECRET), self.address).answer()
                line = RecordLine(sock)
                try:
                    while True:
                        self.answer(line, line.asked())
                except (EOFError, OSError):
                    pass

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.thread.join(10)


def soon() -> float:
    return time.monotonic() + 10


def dies_in_mid_get(line, asked) -> None:
    line.say((True,) * len(asked.keys), soon())
    line.send([record(FORMAT, asked.keys[0]).data, record(FORMAT, asked.keys[1]).data[:1000]], soon())
    line.sock.shutdown(socket.SHUT_RDWR)


def trickles(line, asked) -> None:
    line.say((True,) * len(asked.keys), soon())
    for _ in range(400):
        line.send([memoryview(b"x")], soon())
        time.sleep(0.01)


def answers_for_another_number(line, asked) -> None:
    line.say((True,) * (len(asked.keys) + 1), soon())


def sends_nonsense(line, asked) -> None:
    line.send([memoryview(b"\xff" * 64)], soon())


def sends_other_blocks(line, asked) -> None:
    line.say((True,) * len(asked.keys), soon())
    line.send([record(FORMAT, key(1000 + n)).data for n in range(len(asked.keys))], soon())


@pytest.mark.parametrize(
    ("answer", "expected", "says"),
    [
        (dies_in_mid_get, [False] * 4, "closed"),
        (trickles, [False] * 4, "too long"),
        (answers_for_another_number, [False] * 4, "5 blocks"),
        (sends_nonsense, [False] * 4, "a message of"),
        (sends_other_blocks, [False] * 4, None),
    ],
)
def test_a_peer_that_misbehaves_gives_no_block(answer, expected, says):
    crooked = Crooked(answer)
    try:
        with store_at(crooked.address, timeout_s=0.3) as store:
            begin = time.monotonic()
            assert get(store, 1, 2, 3, 4) == expected
            assert time.monotonic() - begin < 5
            assert (store.error is None) if says is None else (says in store.error), store.error
            assert store.num_bad == (4 if says is None else 0)
    finally:
        crooked.close()


def test_a_guest_that_misbehaves_is_sent_away_and_holds_nothing(caplog):
    """Half a message, keys of no group, a get that nobody reads: pins end with the connection."""
    with peer() as other:
        other.put(*range(1, 60))
        for what in ("keys", "nonsense", "vanishes"):
            with store_at(other.address) as store:
                assert store.find([key(1)]) == [True]
                line = store._line
                if what == "keys":
                    line.say(Find((key(1, 7),)), soon())
                elif what == "nonsense":
                    line.send([memoryview(b"\x05\x00\x00\x00hello")], soon())
                else:
                    line.say(Get(tuple(key(n) for n in range(1, 60))), soon())
            other.until(lambda: not other.pool.peers and not other.pool.num_held)
        with store_at(other.address) as store:
            assert get(store, 1) == [True]
    messages = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert any("no KV group" in text for text in messages) and any("decode" in text for text in messages)


def test_two_machines_that_name_each_other():
    """Engine, client, pool and mover of each: what one computed the other loads; asked for what neither has, none
    asks on. Then one is gone: one line, and the other computes."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with peer(layout=TWO) as first:
        there = PeerStore(first.address, TWO, SECRET)
        second = PeerPool({"remote": PeerStore(address, TWO, SECRET)}, layout=TWO)
        third = PeerPool({"remote": PeerStore(second.address, TWO, SECRET)}, layout=TWO, address=address)
        one = Machine({"remote": there})
        other = Machine({"remote": PeerStore(first.address, TWO, SECRET)})
        try:
            one.save(1)  # write-through: into the first pool's memory
            one.settle()
            assert other.load(1) == 6
            assert other.client.hits["remote"] == 6
            assert other.load(9) == 0
            with store_at(third.address, TWO) as store:
                assert store.find([key(5)]) == [False], "second and third name each other: neither asks the other"
            assert not second.pool._jobs and not third.pool._jobs
        finally:
            for machine in (one, other):
                machine.close()
            for pool in (second, third):
                pool.close()


def test_the_peer_is_gone_and_the_other_goes_on(caplog):
    with peer(layout=TWO) as first:
        one = Machine({"remote": PeerStore(first.address, TWO, SECRET)})
        other = Machine({"remote": PeerStore(first.address, TWO, SECRET)})
        one.save(1)
        one.settle()
        assert other.load(1) == 6
        first.close()
        caplog.clear()
        for root in (2, 3, 4):
            assert other.load(root) == 0
        lines = [each.getMessage() for each in caplog.records]
        assert len(lines) == 1 and "remote" in lines[0] and first.address in lines[0] and "tried again" in lines[0]
        one.close()
        other.close()


def test_a_disk_between_does_not_change_that(tmp_path):
    """Nearest first: what the own disk has is not asked of the peer."""
    with peer(layout=TWO) as first:
        one = Machine({"disk": disk(tmp_path), "remote": PeerStore(first.address, TWO, SECRET)})
        for root in range(1, 4):
            one.save(root)
            one.settle()
        assert [one.load(root) for root in range(1, 4)] == [6] * 3
        assert one.client.hits["remote"] == 0 and one.client.hits["disk"] > 0
        assert one.pool.lower[1].counts.num_written > 0
        assert hashes(1)
        one.close()
