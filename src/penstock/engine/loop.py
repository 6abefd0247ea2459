"""The live loop of an engine process: messages in, steps, messages out. Knows wire and clock only by their doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from penstock.core.doors import Executor, Wire
from penstock.engine.engine import Engine
from penstock.engine.messages import FromEngine

MOVING_WAIT_S = 0.001  # while KV is on its way: its end is found by looking
IDLE_WAIT_S = 0.1  # an idle engine looks at deadlines and watchers this often


class EngineWire(Wire, Protocol):
    """The engine's end of the wire to its front end."""

    def wait(self, timeout_s: float) -> bool:
        """Return when something has arrived, or after the time; whether something has."""
        ...


def run_engine(
    engine: Engine,
    executor: Executor,
    wire: EngineWire,
    now: Callable[[], float],
    beside: Callable[[float], None] | None = None,
) -> None:
    """Drive `engine` until it has drained. Exceptions of the executor go to the caller: the engine cannot go on.

    `beside` is called, with the time, once a round.
    """
    while not engine.stopped:
        if beside is not None:
            beside(now())
        if not turn(engine, executor, wire, now):
            wire.wait(MOVING_WAIT_S if engine.has_moves else IDLE_WAIT_S)


def turn(engine: Engine, executor: Executor, wire: Wire, now: Callable[[], float]) -> bool:
    """One round: take messages in, launch, complete the oldest step. False when there was nothing to do."""
    messages = wire.receive()
    out: list[FromEngine] = []
    time = now()
    for message in messages:
        out += engine.handle(message, time)
    out += engine.launch(now())
    for item in out:
        wire.send(item)
    if engine.scheduler.num_submitted:
        for item in engine.complete(executor.collect(), now()):
            wire.send(item)
        return True
    return bool(messages)
