"""A Mooncake master of its own on a free port of 127.0.0.1, as the wheel brings it."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tests.ports import free_port

from penstock.tiers.mooncake import load

TIMEOUT_S = 20.0


class Master:
    """Runs until `stop`; `start` again under the same port. Skips the test where there is none."""

    def __init__(self) -> None:
        try:
            load()
        except ImportError as error:
            pytest.skip(str(error))
        spec = importlib.util.find_spec("mooncake")
        assert spec is not None and spec.origin is not None
        self._program = Path(spec.origin).parent / "mooncake_master"
        self.port = free_port()
        self.start()

    def start(self) -> None:
        flags = (f"-rpc_port={self.port}", "-rpc_address=127.0.0.1", "-metrics_host=127.0.0.1",
                 f"-metrics_port={free_port()}", "-minloglevel=3")  # fmt: skip
        self.process = subprocess.Popen(
            [str(self._program), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until_s = time.monotonic() + TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < until_s and self.process.poll() is None, "no master"
                time.sleep(0.05)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def url(self, lend: str = "") -> str:
        return f"mooncake://127.0.0.1:{self.port}" + (f"?lend={lend}" if lend else "")
