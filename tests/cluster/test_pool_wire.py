"""The line to the machine's pool: an engine goes on when nobody is at its other end."""

from __future__ import annotations

import threading
from pathlib import Path

from penstock.cluster.pool import PoolWire
from penstock.core.tiering import Match


def test_a_pool_that_is_gone_does_not_stop_an_engine(tmp_path: Path) -> None:
    wire = PoolWire(str(tmp_path))

    def ask() -> None:
        for n in range(5000):
            wire.send(Match(n, (b"key",)), 0.0)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive(), "the engine waits for a pool that never reads"
    assert not wire.receive(0.0)
    wire.close()
