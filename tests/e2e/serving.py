"""`penstock serve` as its user starts it: a process with its engine's process, and what is asked of both from outside.

Knows HTTP and /proc. Does not import the server, the engine or torch: what a test wants to know, it asks over a socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import openai
from tests.ports import free_port

import penstock

MODEL = "penstock-tiny"
ASSETS = Path(penstock.__file__).parent / "assets" / MODEL
SOURCE = str(Path(penstock.__file__).parents[1])
MAX_MODEL_LEN = 512  # of the shared server: a prompt that is too long is then still a short one
# fp32, so that two ways to one answer differ by rounding of 1e-6 only (E1 in plain torch); the KV fits 10,000 tokens.
PLAIN = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", "64M")
SMALL = ("--kv-cache-memory-bytes", "32M", "--disable-log-stats")  # standard error has what goes wrong and no more
START_S = 120.0


def clean_environment(**more: str) -> dict[str, str]:
    """Ours, without settings of this shell, with the package under test first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "VLLM_"))}
    return {**kept, "PYTHONPATH": SOURCE, **more}


def penstock_command(*arguments: str, stdin: str = "", timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """`penstock ...` in a process of its own, to its end."""
    command = [sys.executable, "-m", "penstock.cli", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout_s, env=clean_environment(), check=False
    )


def until(condition: Callable[[], Any], timeout_s: float = 20.0, what: str = "it") -> Any:
    """Wait for a true value and return it. Fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """The process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class RealServer:
    """`penstock serve MODEL` on a free port. Leaving the context kills what is left of it, by process id."""

    def __init__(
        self,
        *arguments: str,
        model: str = MODEL,
        api_key: str = "none",
        program: tuple[str, ...] = ("-m", "penstock.cli"),
        verb: str = "serve",
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.api_key = api_key
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in __exit__
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, *program, verb, *([model] if model else []), "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env=clean_environment(),
            start_new_session=True,
        )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=60, headers={"authorization": f"Bearer {api_key}"})
        self._children: set[int] = set()

    def __enter__(self) -> RealServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.children()
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        for pid in self._children:
            if is_running(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._out.close()
        self._err.close()

    # ---- the process ----

    def output(self) -> str:
        """What it wrote to standard output so far."""
        return _all_of(self._out)

    def errors(self) -> str:
        """What it wrote to standard error so far."""
        return _all_of(self._err)

    def until_ready(self) -> RealServer:
        """Wait for 200 on /health. Fails with the server's own words when it ends before."""

        def ready() -> bool:
            assert self.process.poll() is None, self.output() + self.errors()
            with contextlib.suppress(httpx.TransportError):
                return self.http.get("/health").status_code == 200
            return False

        until(ready, START_S, "a ready server")
        self.children()
        return self

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(timeout_s)

    def children(self) -> list[int]:
        """Process ids of its running children: the engine and the template workers."""
        found: list[int] = []
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                found += map(int, (task / "children").read_text(encoding="ascii").split())
        self._children.update(found)
        return found

    def engine_pid(self) -> int:
        """The child that is the engine."""
        for pid in self.children():
            if "penstock.build.engine" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8"):
                return pid
        raise AssertionError("no engine process")

    def left_over(self) -> list[int]:
        """Children that outlived it."""
        return [pid for pid in self._children if is_running(pid)]

    # ---- what it says ----

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=60, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The body of a successful /v1/completions."""
        response = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def token_ids(self, text: str) -> list[int]:
        """What /tokenize makes of a text."""
        tokens: list[int] = self.post("/tokenize", {"prompt": text}).json()["tokens"]
        return tokens

    def snapshot(self) -> dict[str, Any]:
        return dict(self.http.get("/live/snapshot").raise_for_status().json())

    def held_blocks(self) -> int:
        """Blocks that requests hold, in all engines."""
        held = [each["kv"] for each in self.snapshot()["engines"] if each["kv"]]
        return sum(int(kv["used"] + kv["shared"] + kv["filling"]) for kv in held)

    def is_idle(self) -> bool:
        """No request runs or waits, and none holds a block."""
        totals = self.snapshot()["totals"]
        return totals["num_requests_running"] == totals["num_requests_waiting"] == 0 == self.held_blocks()

    def until_idle(self, timeout_s: float = 20.0) -> None:
        """Fails if a request or a block is left after `timeout_s`."""
        until(self.is_idle, timeout_s, "giving all blocks back")


@contextlib.contextmanager
def streaming(server: RealServer, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """Events of a streamed answer, as they come; leaving the context closes the connection. Ends at [DONE]."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        yield events_of(response)


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])


def _all_of(file: Any) -> str:
    position = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), position, 0).decode()


def assert_error(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The response is an error in OpenAI's shape, with a request id; its message."""
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    return str(error["message"])
