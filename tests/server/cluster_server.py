"""A server before three scripted engines behind a router, in threads of this process: real front end, wires and router.

The engines compute nothing (scripted_engine.py); one of them says that it sends KV to the others, and they say that
they have tiers. What they report of that grows with the requests that they served.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from tests.fakes.placement import LeastLoaded
from tests.server.scripted_engine import ScriptedEngine, drive
from tests.server.synthetic_cluster import decode_report, prefill_report
from tests.server.tiny_model import MODEL, tiny_served

from penstock.cluster.beats import Silences
from penstock.cluster.restarts import Restarts
from penstock.cluster.router import Router
from penstock.config.schema import Config, ModelOptions, ServerOptions
from penstock.engine.messages import FromEngine, Peer, Peers, Ready, Report, ToEngine
from penstock.server.backend import ManyEngines
from penstock.server.serve import run_server

ROLES = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
STEP_S = 0.01


class NamedEngine(ScriptedEngine):
    """A scripted engine among others."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.num_taken = 0

    def ready(self) -> Ready:
        role = ROLES[self.name]
        return msgspec.structs.replace(super().ready(), peer=Peer(self.name, role, "ipc://", f"shm://{self.name}"))

    def handle(self, message: ToEngine, now: float) -> list[FromEngine]:
        if isinstance(message, Peers):
            return []
        before = len(self.requests)
        answers = super().handle(message, now)
        self.num_taken += max(0, len(self.requests) - before)
        return answers

    def report(self, now: float) -> Report:
        said = super().report(now)
        if ROLES[self.name] == "prefill":
            told = prefill_report(now, 1 + int(now) % 100_000, 1)  # it goes on sending
        else:
            told = decode_report(now, 1 + self.num_taken)
        return msgspec.structs.replace(
            told, name=self.name, num_running=told.guests_running + said.num_running, num_waiting=said.num_waiting,
            waiting_by_reason={}, guests_waiting_by_reason={}, num_steps_total=said.num_steps_total,
        )  # fmt: skip


class EngineThread:
    """An engine in a thread that looks like a process to the server."""

    def __init__(self, name: str, address: str) -> None:
        self.engine = NamedEngine(name)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=drive, args=(self.engine, address, self._stop, STEP_S), daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        """As subprocess.Popen's."""
        return None if self._thread.is_alive() else 0

    def has_beaten(self) -> bool:
        return True

    def kill(self) -> None:
        self._stop.set()


@dataclass
class ClusterServer:
    """A running server: `base` is its URL without a slash at the end."""

    base: str = ""
    engines: dict[str, EngineThread] = field(default_factory=dict)
    up: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def cluster_server() -> Iterator[ClusterServer]:
    """A server that answers; stopped and joined afterwards."""
    server = ClusterServer()
    config = Config(
        model=ModelOptions(served_model_name=(MODEL,)), server=ServerOptions(port=0, disable_log_stats=True)
    )

    def launching(name: str, address: str) -> EngineThread:
        server.engines[name] = EngineThread(name, address)
        return server.engines[name]

    def on_ready(ready: Ready, url: str) -> None:
        server.base = url
        server.up.set()

    backend = ManyEngines(Router(ROLES, LeastLoaded(ROLES, min_tokens=8)), launching, Restarts(0), Silences(10.0))
    thread = threading.Thread(target=run_server, args=(config, backend, tiny_served), kwargs={"on_ready": on_ready})
    thread.start()
    try:
        if not server.up.wait(30):
            raise RuntimeError("the server did not come up")
        yield server
    finally:
        for engine in server.engines.values():
            engine.kill()  # the server ends when its engines do
        thread.join(20)
        assert not thread.is_alive()
