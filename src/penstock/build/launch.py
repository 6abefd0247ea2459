"""The engine's process as its front end sees it. Imports no torch and no web server: it is started before either."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from penstock.build.handover import Handover, encode
from penstock.cluster.beat_pipe import BeatReader
from penstock.cluster.seat import Seat
from penstock.config.complete import Resolved
from penstock.config.kv_pool import pool_settings
from penstock.config.openmp import bound_spinning
from penstock.config.schema import Config

log = logging.getLogger("penstock.server")

POOL_EXIT_S = 10.0  # for blocks on their way to disk
POOL_LIFE_S = 5.0  # a pool that ends sooner is not started again before


class EngineProcess:
    """A process that loads at once and dials when it is told an address. Its log goes where ours goes.

    `pool`: the directory of the machine's KV pool, where that is a process of its own.
    """

    def __init__(self, resolved: Resolved, seat: Seat | None = None, pool: str = "") -> None:
        command = [sys.executable, "-m", "penstock.build.engine_process", repr(time.monotonic())]
        self._beats = BeatReader()
        writer = self._beats.writer
        if seat is not None:
            command += [seat.name, str(writer)]  # the name also for people who look at processes
        environment = _environment(resolved)
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=(writer,))
        finally:
            os.close(writer)
        encoded = encode(Handover(resolved, seat, pool))
        self._tell(len(encoded).to_bytes(8, "little") + encoded)

    def dial(self, address: str) -> None:
        """The wire's other end: once, or the process leaves with this one."""
        self._tell(address.encode())

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._beats.close()
        return code

    def has_beaten(self) -> bool:
        """Whether it has said since the last call that it goes on. Only an engine with a seat ever does."""
        return self._beats.heard()

    def kill(self) -> None:
        self._process.kill()
        self._beats.close()

    def _tell(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()  # and stays open: its end tells the engine that this process is gone
        except BrokenPipeError:
            pass  # it is gone already; its exit code says so


class PoolProcess:
    """The process of a machine's KV pool. It leaves when this one does, or at `close`.

    When it ends otherwise it is started again, at once if it lived long enough; its engines join the new one.
    """

    def __init__(self, config: Config, directory: str) -> None:
        self._config, self._directory = config, directory
        self._is_closed, self._starting = threading.Event(), threading.Lock()
        self._process = self._start()
        threading.Thread(target=self._watch, name="penstock-pool-watch", daemon=True).start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "penstock.build.pool_process", self._directory, self._config.runtime.log_level]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=_findable(dict(os.environ)))
        encoded = msgspec.msgpack.encode(pool_settings(self._config))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already; its exit code says so
            process.stdin.write(len(encoded).to_bytes(8, "little") + encoded)
            process.stdin.flush()
        return process

    def _watch(self) -> None:
        while True:
            begin = time.monotonic()
            code = self._process.wait()
            rest_s = max(0.0, begin + POOL_LIFE_S - time.monotonic())
            if self._is_closed.is_set():
                return
            log.error("the pool of KV tiers has ended (exit code %s); it is started again", code)
            assert self._process.stdin is not None
            self._process.stdin.close()
            while True:
                if self._is_closed.wait(rest_s):
                    return
                with self._starting:
                    if self._is_closed.is_set():
                        return
                    try:
                        self._process = self._start()
                        break
                    except OSError as error:
                        log.error("the pool of KV tiers cannot be started: %s", error)
                        rest_s = POOL_LIFE_S

    def close(self) -> None:
        """Let it write what it has to, then end it."""
        with self._starting:
            self._is_closed.set()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(POOL_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _findable(environment: dict[str, str]) -> dict[str, str]:
    """With this package findable as it was for us."""
    source, path = str(Path(__file__).parents[2]), environment.get("PYTHONPATH")
    return environment | {"PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source}


def _environment(resolved: Resolved) -> dict[str, str]:
    """Ours, with what OpenMP must know before torch is imported, and this package findable as it was for us."""
    environment = _findable(dict(os.environ)) | {"OMP_NUM_THREADS": str(resolved.config.runtime.num_threads)}
    bound_spinning(environment)
    return environment
