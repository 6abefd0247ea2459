"""What a server computes with: one engine in a process of its own, or many behind a router.

Knows wires, processes and the router; no HTTP, and nothing of what engines are made of.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from penstock.cluster.beats import Silences
from penstock.cluster.restarts import Restarts
from penstock.cluster.roles import RoleKeeper
from penstock.cluster.router import Router
from penstock.engine.messages import Drain, Fatal, FromEngine, Ready, ToEngine
from penstock.engine.wire import LoopWire, ZmqWire, listen

log = logging.getLogger("penstock.server")

OnMessages = Callable[[Sequence[FromEngine]], None]


class EngineProcess(Protocol):
    """An engine's process: subprocess.Popen has these."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        ...

    def kill(self) -> None: ...


class BeatingProcess(EngineProcess, Protocol):
    """An engine's process among others, which says that it goes on."""

    def has_beaten(self) -> bool:
        """Whether it has since the last call."""
        ...


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

    @property
    def roles(self) -> RoleKeeper | None:
        """What watches how many engines each role needs; None where there are no roles."""
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

    @property
    def roles(self) -> RoleKeeper | None:
        return None


@dataclass(slots=True)
class _Run:
    """One life of an engine."""

    wire: ZmqWire
    loop_wire: LoopWire
    process: BeatingProcess | None = None
    has_exited: bool = False  # its last words may still be on the wire
    reason: str = ""  # in its own words, why it ends


class ManyEngines:
    """Engines behind a router, in its front end's process. `launch(name, address)` starts one that dials `address`.

    An engine that dies costs its requests some time. It is started again, within limits; `poll` says so only when none
    is left that could go on. One that is silent for too long is killed, and has died.
    """

    def __init__(
        self,
        router: Router,
        launch: Callable[[str, str], BeatingProcess],
        restarts: Restarts,
        silences: Silences,
    ) -> None:
        self.router = router
        self._launch, self._restarts, self._silences = launch, restarts, silences
        self._runs: dict[str, _Run] = {}
        self._due_s: dict[str, float] = {}  # when to start again
        self._codes: dict[str, int] = {}  # of those that will not come back
        self._is_ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_messages: OnMessages | None = None

    def open(self, loop: asyncio.AbstractEventLoop, on_messages: OnMessages) -> None:
        self._loop, self._on_messages = loop, on_messages

    def launch(self) -> None:
        for name in self.router.engines:
            self._start(name)

    def _start(self, name: str) -> None:
        assert self._loop is not None
        wire = listen()
        run = self._runs[name] = _Run(wire, LoopWire(wire, self._loop, partial(self._receive, name)))
        run.process = self._launch(name, wire.address)

    def send(self, message: ToEngine) -> None:
        if self._on_messages is None:
            return
        now = time.monotonic()
        if isinstance(message, Drain):
            self._is_ending = True
            for name in list(self._due_s):
                self._give_up(name, 1, "it had ended, and the server is shutting down", now)
        self._deliver(*self.router.submit(message, now))

    @property
    def is_full(self) -> bool:
        return any(run.loop_wire.is_full for run in self._runs.values())

    def poll(self) -> int | None:
        """Looks after the processes: one that has ended is taken out of the router once its last words were read."""
        now = time.monotonic()
        self._listen(now)
        for name, run in list(self._runs.items()):
            code = None if run.process is None else run.process.poll()
            if code is None:
                continue
            if run.has_exited:
                self._ended(name, run, code, now)
            run.has_exited = True
        for name in [name for name, due_s in self._due_s.items() if due_s <= now]:
            del self._due_s[name]
            try:
                self._start(name)
            except OSError as error:
                self._gone(name, 1, f"cannot be started: {error}", now)
        self._deliver([], self.router.tick(now))
        if self._runs or self._due_s or not self._codes:
            return None
        return max(self._codes.values(), key=abs)

    def _listen(self, now: float) -> None:
        """Engines that hang are taken out at once: a process that the system holds may take its time to die."""
        heard = {name for name, run in self._runs.items() if run.process is not None and run.process.has_beaten()}
        serving = [name for name in self.router.serving if name in self._runs]
        for name in self._silences.look(serving, heard, now):
            process = self._runs[name].process
            assert process is not None
            if process.poll() is None:  # else it has died, and its last words are read first
                process.kill()
                reason = f"it hangs: nothing was heard of it for {self._silences.limit_s:g} s, it was killed"
                self._gone(name, -signal.SIGKILL, reason, now)

    def _ended(self, name: str, run: _Run, code: int, now: float) -> None:
        """A process is gone, and all it has said was read."""
        engine = self.router.engines.get(name)
        if engine is None or engine.stopped:
            self._close_run(name)
            self._codes[name] = code
            return
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self._gone(name, code, run.reason or f"its process ended with {how}", now)

    def _gone(self, name: str, code: int, reason: str, now: float) -> None:
        """An engine is no more: it is started again after a while, or given up."""
        self._close_run(name)
        may_return = self.router.is_ready and not self._is_ending
        wait_s = self._restarts.wait_s(name, now) if may_return else None
        if wait_s is None:
            self._give_up(name, code, reason, now)
            return
        log.error("engine %s: %s; it is started again", name, reason)
        self._due_s[name] = now + wait_s
        self._deliver(*self.router.restarting(name, now))

    def _close_run(self, name: str) -> None:
        run = self._runs.pop(name, None)
        if run is not None:
            run.loop_wire.close()
            run.wire.close(0.0)

    def _give_up(self, name: str, code: int, reason: str, now: float) -> None:
        log.error("engine %s: %s", name, reason)
        self._due_s.pop(name, None)
        self._codes[name] = code
        self._deliver(*self.router.lost(name, reason, now))

    def kill(self) -> None:
        self._is_ending = True
        for run in self._runs.values():
            if run.process is not None and run.process.poll() is None:
                run.process.kill()

    def hush(self) -> None:
        self._is_ending, self._on_messages = True, None
        self._due_s.clear()
        for run in self._runs.values():
            run.loop_wire.close()

    def close(self, linger_s: float) -> None:
        for run in self._runs.values():
            run.wire.close(linger_s)

    def engine_of(self, request_id: str) -> str:
        return self.router.decisions.engine_of(request_id)

    def explain_route(self, request_id: str) -> dict[str, Any] | None:
        return self.router.decisions.explain(request_id)

    def recent_routes(self, number: int) -> list[dict[str, Any]]:
        return self.router.decisions.recent(number)

    @property
    def num_routes(self) -> int:
        return self.router.decisions.num_made

    @property
    def roles(self) -> RoleKeeper | None:
        return self.router.keeper

    def _receive(self, name: str, messages: Sequence[FromEngine]) -> None:
        for message in messages:
            if isinstance(message, Fatal) and self.router.is_ready:
                self._runs[name].reason = message.message  # its process is about to end
                continue
            if isinstance(message, Ready) and self.router.is_ready:
                log.info("engine %s is back", name)
            self._deliver(*self.router.receive(name, message, time.monotonic()))

    def _deliver(self, told: Sequence[FromEngine], post: Sequence[tuple[str, ToEngine]]) -> None:
        for name, message in post:
            run = self._runs.get(name)
            if run is not None:
                run.loop_wire.send(message)
        if told and self._on_messages is not None:
            self._on_messages(told)
