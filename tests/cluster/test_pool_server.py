"""The pool's process and its engines' lines to it, over real sockets in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest
import zmq
from tests.tiers.tier_blocks import ONE, key

from penstock.cluster import pool
from penstock.cluster.pool import GREET_S, SILENCE_S, PoolServer, PoolWire, Welcome
from penstock.config.kv_pool import pool_settings
from penstock.config.load import resolve
from penstock.core.pool_contents import POOL
from penstock.core.tiering import Filled, PoolChanged, Reserve, Reserved, ToEngine
from penstock.tiers.arena import Arena


class Engine:
    """An engine's line to the pool, and what came over it."""

    def __init__(self, server: PoolServer, directory: Path) -> None:
        self.server = server
        self.line = PoolWire(str(directory), ONE)
        self.ahead_s = 0.0  # of its clock
        self.arenas: list[Arena | None] = []  # what the line said of the pool's memory
        self.line.on_arena = self.arenas.append
        asking = Thread(target=lambda: self.arenas.append(self.line.join()), daemon=True)
        asking.start()
        end = time.monotonic() + 10
        while not self.arenas and time.monotonic() < end:
            server.turn()
            time.sleep(0.001)
        assert self.arenas
        self.heard: list[ToEngine | PoolChanged] = []

    def wait(self, kind: type, seconds: float = 10) -> object:
        """The next message of this kind."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.server.turn()
            self.heard += self.line.receive(time.monotonic() + self.ahead_s)
            for n, message in enumerate(self.heard):
                if isinstance(message, kind):
                    return self.heard.pop(n)
            time.sleep(0.001)
        raise AssertionError(f"no {kind.__name__} came; {self.heard}")

    def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Both go on until it holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            self.server.turn()
            self.heard += self.line.receive(time.monotonic() + self.ahead_s)
            time.sleep(0.001)

    def miss(self) -> None:
        """Hear nothing of the pool for so long that it is lost."""
        for _ in range(10):
            self.ahead_s += SILENCE_S + 1
            self.heard += self.line.receive(time.monotonic() + self.ahead_s)
        assert self.line.is_lost(0.0)

    def save(self, number: int) -> None:
        """A block that is whole."""
        self.line.send(Reserve(number, (key(number),), (b"",), (0.1,)), 0.0)
        reserved = self.wait(Reserved)
        assert isinstance(reserved, Reserved) and reserved.slots[0]
        self.line.send(Filled(number, (True,)), 0.0)


def pool_at(directory: Path) -> PoolServer:
    return PoolServer(pool_settings(resolve({"kv_offloading_size": "4M"}, environ={})), directory)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    with closing(pool_at(tmp_path)) as server:
        yield server


def test_routers_are_told_everything_again_after_a_pool_was_held_to_be_gone(server: PoolServer, tmp_path: Path) -> None:
    """Its engines have told them that it holds nothing, under a later life than it had then."""
    engine = Engine(server, tmp_path)
    engine.save(1)
    before = engine.wait(PoolChanged)
    assert isinstance(before, PoolChanged) and before.events.engine == POOL
    assert [hash_ for change in before.events.changes for hash_ in change.hashes] == [key(1)[:-1]]
    server._told_s -= SILENCE_S + 1  # it was stopped for so long
    after = engine.wait(PoolChanged)
    assert isinstance(after, PoolChanged)
    assert after.events.life > before.events.life + 1 and after.events.seq == 0
    assert [hash_ for change in after.events.changes for hash_ in change.hashes] == [key(1)[:-1]]
    engine.line.close()


def test_an_engine_joins_the_pool_that_takes_a_dead_ones_place(tmp_path: Path) -> None:
    with closing(pool_at(tmp_path)) as server:
        engine = Engine(server, tmp_path)
        engine.save(1)
    engine.heard.clear()
    with closing(pool_at(tmp_path)) as engine.server:
        engine.line.send(Reserve(2, (key(2),), (b"",), (0.1,)), 0.0)  # which nobody has asked this pool to know
        engine.until(lambda: engine.line.is_lost(0.0))
        assert engine.arenas[1:] == [None], "the dead pool's memory is given back"
        engine.line.send(Reserve(3, (key(3),), (b"",), (0.1,)), 0.0)  # not before it has joined
        engine.until(lambda: not engine.line.is_lost(0.0))
        assert len(engine.arenas) == 3 and isinstance(engine.arenas[2], Arena)
        assert not any(isinstance(message, Reserved) for message in engine.heard)
        engine.save(4)
        told = engine.wait(PoolChanged)
        assert isinstance(told, PoolChanged) and told.events.seq == 0
        assert [hash_ for change in told.events.changes for hash_ in change.hashes] == [key(4)[:-1]]
        engine.line.close()


def test_a_loss_is_seen_before_the_welcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was sent before, and though the new pool answers at once."""
    with closing(pool_at(tmp_path)) as server:
        engine = Engine(server, tmp_path)
    with closing(pool_at(tmp_path)) as engine.server:
        for number in range(20):
            engine.line.send(Reserve(number, (key(number),), (b"",), (0.1,)), 0.0)
        greet = engine.line._greet

        def greet_and_wait(now: float) -> None:
            greet(now)
            for _ in range(100):
                engine.server.turn()
                time.sleep(0.002)

        monkeypatch.setattr(engine.line, "_greet", greet_and_wait)
        end = time.monotonic() + 10
        heard: Sequence[object] = ()
        while len(engine.arenas) == 1 and time.monotonic() < end:
            engine.server.turn()
            heard = engine.line.receive(time.monotonic())
        assert engine.arenas[1:] == [None] and engine.line.is_lost(0.0) and not heard
        engine.until(lambda: not engine.line.is_lost(0.0))
        engine.line.close()


def test_a_pool_that_dies_again_before_it_answers(tmp_path: Path) -> None:
    with closing(pool_at(tmp_path)) as server:
        engine = Engine(server, tmp_path)
    with closing(pool_at(tmp_path)) as engine.server:
        engine.line.send(Reserve(2, (key(2),), (b"",), (0.1,)), 0.0)
        engine.until(lambda: engine.line.is_lost(0.0))
        time.sleep(0.1)  # its Hello is there, and nobody reads it
    with closing(pool_at(tmp_path)) as engine.server:
        engine.ahead_s = GREET_S + 0.1
        engine.until(lambda: not engine.line.is_lost(0.0))
        engine.line.close()


def test_a_hello_that_was_lost_is_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GREET_S", 0.3)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as dying:
        dying.bind(f"ipc://{tmp_path}/pool")
        with closing(PoolWire(str(tmp_path), ONE)) as line:
            arenas: list[Arena] = []
            asking = Thread(target=lambda: arenas.append(line.join()), daemon=True)
            asking.start()
            assert dying.poll(10_000)
            dying.close(linger=0)
            with closing(pool_at(tmp_path)) as server:
                end = time.monotonic() + 10
                while not arenas and time.monotonic() < end:
                    server.turn()
                    time.sleep(0.001)
                asking.join(10)
                assert arenas and not line.is_lost(0.0)


def test_memory_that_cannot_be_mapped_is_tried_again(
    server: PoolServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(server, tmp_path)
    attach, tries = engine.line._arena, 0

    def attach_the_third_time(welcome: Welcome) -> Arena:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError("too many open files")
        return attach(welcome)

    monkeypatch.setattr(engine.line, "_arena", attach_the_third_time)
    engine.miss()
    for n in range(3):
        engine.until(lambda n=n: tries > n)
        engine.ahead_s += GREET_S + 0.1
    assert not engine.line.is_lost(0.0) and [type(arena) for arena in engine.arenas[1:]] == [type(None), Arena]
    engine.line.close()


def test_an_idle_engine_misses_its_pool_too(server: PoolServer, tmp_path: Path) -> None:
    """After silence it joins again. What the pool, which was only slow or not even that, holds for it from before is
    let go, and routers, who were told that all is gone, are told what there is."""
    engine = Engine(server, tmp_path)
    engine.save(1)
    before = engine.wait(PoolChanged)
    engine.line.send(Reserve(2, (key(2),), (b"",), (0.1,)), 0.0)
    engine.wait(Reserved)
    assert server._driver is not None and server._driver.pool.num_held == 1
    engine.miss()
    assert engine.arenas[1:] == [None]
    engine.until(lambda: not engine.line.is_lost(0.0))
    assert isinstance(engine.arenas[2], Arena) and server._driver.pool.num_held == 0
    after = engine.wait(PoolChanged)
    assert isinstance(before, PoolChanged) and isinstance(after, PoolChanged)
    assert after.events.life > before.events.life + 1 and after.events.seq == 0
    assert [hash_ for change in after.events.changes for hash_ in change.hashes] == [key(1)[:-1]]
    engine.save(3)
    engine.line.close()


def test_a_pool_that_refuses_is_not_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(pool_at(tmp_path)) as server:
        engine = Engine(server, tmp_path)
    with closing(pool_at(tmp_path)) as engine.server:
        engine.server._hello = lambda message: Welcome(refusal="no room")  # type: ignore[method-assign]
        engine.line.send(Reserve(2, (key(2),), (b"",), (0.1,)), 0.0)
        engine.until(lambda: "cannot be joined again yet: no room" in caplog.text)
        assert engine.line.is_lost(0.0) and engine.arenas[1:] == [None]
    engine.line.close()
