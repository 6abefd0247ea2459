"""What a server computes with: one engine in a process of its own, or many behind a router.

Knows wires, processes and the router; no HTTP, and nothing of what engines are made of.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from penstock.cluster.router import Router
from penstock.engine.messages import FromEngine, ToEngine
from penstock.engine.wire import LoopWire, ZmqWire, listen

log = logging.getLogger("penstock.server")

OnMessages = Callable[[Sequence[FromEngine]], None]


class EngineProcess(Protocol):
    """An engine's process: subprocess.Popen has these."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        ...

    def kill(self) -> None: ...


class Backend(Protocol):
    """Called from the server's event loop, in this order; `close` also when nothing else was."""

    def open(self, loop: asyncio.AbstractEventLoop, on_messages: OnMessages) -> None:
        """Feed what engines say to `on_messages` from now on."""
        ...

    def launch(self) -> None:
        """Start the processes. May raise."""
        ...

    def send(self, message: ToEngine) -> None:
        """Never waits, never fails; before `open` it does nothing."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether somebody does not read what is sent."""
        ...

    def poll(self) -> int | None:
        """An exit code once it cannot go on, None until then."""
        ...

    def kill(self) -> None:
        """End all processes at once."""
        ...

    def hush(self) -> None:
        """Feed no more messages."""
        ...

    def close(self, linger_s: float) -> None:
        """Free the wires."""
        ...

    def engine_of(self, request_id: str) -> str:
        """Name of the engine that decodes a request, or did; "" where there is one without a name."""
        ...

    def explain_route(self, request_id: str) -> dict[str, Any] | None:
        """Why it went there, and what came of it; None where nothing was to decide."""
        ...

    def recent_routes(self, number: int) -> list[dict[str, Any]]:
        """The newest decisions, newest first."""
        ...

    @property
    def num_routes(self) -> int:
        """Decisions since start."""
        ...


class OneEngine:
    """A single engine. `launch(address)` starts the process that dials `address`."""

    def __init__(self, launch: Callable[[str], EngineProcess]) -> None:
        self._launch = launch
        self._wire = listen()
        self._loop_wire: LoopWire | None = None
        self._process: EngineProcess | None = None

    def open(self, loop: asyncio.AbstractEventLoop, on_messages: OnMessages) -> None:
        self._loop_wire = LoopWire(self._wire, loop, on_messages)

    def launch(self) -> None:
        self._process = self._launch(self._wire.address)

    def send(self, message: ToEngine) -> None:
        if self._loop_wire is not None:
            self._loop_wire.send(message)

    @property
    def is_full(self) -> bool:
        return self._loop_wire is not None and self._loop_wire.is_full

    def poll(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def hush(self) -> None:
        if self._loop_wire is not None:
            self._loop_wire.close()

    def close(self, linger_s: float) -> None:
        self._wire.close(linger_s)

    def engine_of(self, request_id: str) -> str:
        return ""

    def explain_route(self, request_id: str) -> dict[str, Any] | None:
        return None

    def recent_routes(self, number: int) -> list[dict[str, Any]]:
        return []

    @property
    def num_routes(self) -> int:
        return 0


class ManyEngines:
    """Engines behind a router, in its front end's process. `launches`: engine name -> what starts its process.

    An engine that dies costs its requests some time; `poll` says so only when none is left that could go on.
    """

    def __init__(self, router: Router, launches: Mapping[str, Callable[[str], EngineProcess]]) -> None:
        self.router = router
        self._launches = launches
        self._wires: dict[str, ZmqWire] = {name: listen() for name in launches}
        self._loop_wires: dict[str, LoopWire] = {}
        self._processes: dict[str, EngineProcess] = {}
        self._exited: dict[str, int] = {}
        self._on_messages: OnMessages | None = None

    def open(self, loop: asyncio.AbstractEventLoop, on_messages: OnMessages) -> None:
        self._on_messages = on_messages
        for name, wire in self._wires.items():
            self._loop_wires[name] = LoopWire(wire, loop, partial(self._receive, name))

    def launch(self) -> None:
        for name, launch in self._launches.items():
            self._processes[name] = launch(self._wires[name].address)

    def send(self, message: ToEngine) -> None:
        if self._on_messages is not None:
            self._deliver(*self.router.submit(message, time.monotonic()))

    @property
    def is_full(self) -> bool:
        return any(wire.is_full for wire in self._loop_wires.values())

    def poll(self) -> int | None:
        """Looks after the processes: one that has ended is taken out of the router once its last words were read."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is None:
                continue
            if name not in self._exited:
                self._exited[name] = code  # its last words may still be on the wire: look again
            elif name in self.router.engines and not self.router.engines[name].stopped:
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                log.error("engine %s ended with %s", name, how)
                self._deliver(*self.router.lost(name, f"its process ended with {how}", time.monotonic()))
        if len(self._exited) < len(self._processes) or not self._processes:
            return None
        return max(self._exited.values(), key=abs)

    def kill(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()

    def hush(self) -> None:
        for wire in self._loop_wires.values():
            wire.close()

    def close(self, linger_s: float) -> None:
        for wire in self._wires.values():
            wire.close(linger_s)

    def engine_of(self, request_id: str) -> str:
        return self.router.decisions.engine_of(request_id)

    def explain_route(self, request_id: str) -> dict[str, Any] | None:
        return self.router.decisions.explain(request_id)

    def recent_routes(self, number: int) -> list[dict[str, Any]]:
        return self.router.decisions.recent(number)

    @property
    def num_routes(self) -> int:
        return self.router.decisions.num_made

    def _receive(self, name: str, messages: Sequence[FromEngine]) -> None:
        for message in messages:
            self._deliver(*self.router.receive(name, message, time.monotonic()))

    def _deliver(self, told: Sequence[FromEngine], post: Sequence[tuple[str, ToEngine]]) -> None:
        for name, message in post:
            wire = self._loop_wires.get(name)
            if wire is not None:
                wire.send(message)
        if told and self._on_messages is not None:
            self._on_messages(told)
