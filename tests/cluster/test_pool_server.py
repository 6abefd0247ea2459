"""The pool's process and its engines' lines to it, over real sockets in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from tests.tiers.tier_blocks import ONE, key

from penstock.cluster.pool import SILENCE_S, PoolServer, PoolWire
from penstock.config.kv_pool import pool_settings
from penstock.config.load import resolve
from penstock.core.pool_contents import POOL
from penstock.core.tiering import Filled, PoolChanged, Reserve, Reserved, ToEngine


class Engine:
    """An engine's line to the pool, and what came over it."""

    def __init__(self, server: PoolServer, directory: Path) -> None:
        self.server = server
        self.line = PoolWire(str(directory))
        welcome: list[object] = []
        asking = Thread(target=lambda: welcome.append(self.line.hello(ONE)), daemon=True)
        asking.start()
        end = time.monotonic() + 10
        while not welcome and time.monotonic() < end:
            server.turn()
            time.sleep(0.001)
        [self.welcome] = welcome
        self.heard: list[ToEngine | PoolChanged] = []

    def wait(self, kind: type, seconds: float = 10) -> object:
        """The next message of this kind."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.server.turn()
            self.heard += self.line.receive(time.monotonic())
            for n, message in enumerate(self.heard):
                if isinstance(message, kind):
                    return self.heard.pop(n)
            time.sleep(0.001)
        raise AssertionError(f"no {kind.__name__} came; {self.heard}")

    def save(self, number: int) -> None:
        """A block that is whole."""
        self.line.send(Reserve(number, (key(number),), (b"",), (0.1,)), 0.0)
        reserved = self.wait(Reserved)
        assert isinstance(reserved, Reserved) and reserved.slots[0]
        self.line.send(Filled(number, (True,)), 0.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    config = resolve({"kv_offloading_size": "4M"}, environ={})
    server = PoolServer(pool_settings(config), tmp_path)
    yield server
    server.close()


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
