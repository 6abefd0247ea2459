"""The line to the machine's pool: an engine goes on when nobody is at its other end; a dead engine leaves no pins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiers.tier_blocks import TWO

from penstock.cluster.pool import PoolServer, PoolWire
from penstock.config.kv_pool import PoolSettings
from penstock.config.schema import CacheOptions
from penstock.core.tiering import Match, Release, Reserve, Reserved, block_key

KEYS = tuple(block_key(bytes((n,)) * 16, group) for n in range(3) for group in range(2))

ENGINE = """
import sys, time
sys.path.insert(0, sys.argv[2])
from tests.cluster.test_pool_wire import join, reserve
wire = join(sys.argv[1])
print(sum(map(bool, reserve(wire))), flush=True)
time.sleep(600)
"""


def test_a_pool_that_is_gone_does_not_stop_an_engine(tmp_path: Path) -> None:
    wire = PoolWire(str(tmp_path), TWO)

    def ask() -> None:
        for n in range(5000):
            wire.send(Match(n, (b"key",)), 0.0)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive(), "the engine waits for a pool that never reads"
    assert not wire.receive(0.0)
    wire.close()


def join(directory: str) -> PoolWire:
    wire = PoolWire(directory, TWO)
    wire.join()
    return wire


def reserve(wire: PoolWire) -> tuple[int, ...]:
    """Ask for slots for KEYS; which ones it gets."""
    wire.send(Reserve(1, KEYS, (b"",) * len(KEYS), (1.0,) * len(KEYS)), 0.0)
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s:
        for answer in wire.receive(time.monotonic()):
            if isinstance(answer, Reserved):
                return answer.slots
        time.sleep(0.005)
    raise AssertionError("the pool does not answer")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PoolServer]:
    """A pool, served by a thread."""
    running, stop = PoolServer(PoolSettings(CacheOptions(kv_offloading_size=4 << 20)), tmp_path), threading.Event()
    thread = threading.Thread(target=running.run, args=(stop.is_set,), daemon=True)
    thread.start()
    yield running
    stop.set()
    thread.join(20.0)
    assert not thread.is_alive()
    running.close()


def held(server: PoolServer) -> int:
    return 0 if server._driver is None else server._driver.pool.num_held


def until_held(server: PoolServer, number: int, timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while held(server) != number:
        assert time.monotonic() < end_s, f"{held(server)} fetches and reservations are held, not {number}"
        time.sleep(0.005)


def test_what_a_killed_engine_held_goes_at_once(server: PoolServer, tmp_path: Path) -> None:
    """Not with its lease of two minutes. What others hold stays."""
    other = join(str(tmp_path))
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", ENGINE, str(tmp_path), root], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == f"{len(KEYS)}\n"
        assert not any(reserve(other)), "each key is somebody's to fill"
        until_held(server, 1)
        os.kill(process.pid, signal.SIGKILL)
        until_held(server, 0)
        assert all(reserve(other))
        time.sleep(0.5)  # the pool has looked around by then
        assert held(server) == 1
        other.send(Release(1), 0.0)
        until_held(server, 0)
    finally:
        process.kill()
        process.communicate()
        other.close()


def test_what_a_stopped_engine_holds_stays(server: PoolServer, tmp_path: Path) -> None:
    """Its lease says for how long: it may wake up and read."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", ENGINE, str(tmp_path), root], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == f"{len(KEYS)}\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.5)  # two times that the pool tells all engines how it is
        assert held(server) == 1
    finally:
        process.kill()
        process.communicate()
    until_held(server, 0)
