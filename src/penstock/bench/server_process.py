"""A `penstock serve` as a process: started on a free port, watched until it is ready, stopped by its process id.

Knows the command, its ready line and signals. Does not know what the server is asked.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

READY = re.compile(r"^ready after ([0-9.]+) s: (.*)$")
STOP_TIMEOUT_S = 30.0
LAST_LINES = 12


class StartFailed(RuntimeError):
    """The server did not come up or did not answer; its last lines are in the message."""


@dataclass(slots=True)
class ServerProcess:
    """A running `penstock serve`: URL, process, when it was started (time.monotonic), printed lines with times."""

    url: str
    port: int
    process: subprocess.Popen[str]
    started_s: float
    lines: list[tuple[float, str]] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)

    def ready_line(self) -> tuple[float, re.Match[str]] | None:
        """(when, the line with the stages) once it was printed."""
        for when_s, line in self.lines:
            match = READY.match(line)
            if match:
                return when_s, match
        return None

    def tail(self) -> str:
        """The last lines, for errors."""
        return "\n".join("  " + line for _, line in self.lines[-LAST_LINES:])


@contextlib.contextmanager
def running_server(serve_arguments: Sequence[str], timeout_s: float = 300.0) -> Iterator[ServerProcess]:
    """A `penstock serve` on a free port of 127.0.0.1 that is ready; stopped afterwards. Raises StartFailed."""
    port = free_port()
    command = [sys.executable, "-m", "penstock.cli", "serve", *serve_arguments, "--port", str(port)]
    started_s = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the engine goes with a server that has to be killed
    )
    server = ServerProcess(f"http://127.0.0.1:{port}", port, process, started_s)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        if not server.ready.wait(timeout_s):
            raise StartFailed(f"the server was not ready within {timeout_s:g} s; its last lines:\n{server.tail()}")
        if server.ready_line() is None:
            process.wait(STOP_TIMEOUT_S)
            raise StartFailed(f"the server ended with exit code {process.returncode}:\n{server.tail()}")
        yield server
    finally:
        _stop(process)
        reader.join(STOP_TIMEOUT_S)
        assert process.stdout is not None
        process.stdout.close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _read(server: ServerProcess) -> None:
    """Collect printed lines with their times until the output ends."""
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append((time.monotonic(), line.rstrip("\n")))
        if READY.match(line):
            server.ready.set()
    server.ready.set()


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL (to all it started, too) for one that does not listen."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_TIMEOUT_S)
