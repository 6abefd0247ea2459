"""The protocols behind which features live: one to four methods each. Names no class that implements them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from penstock.core.plan import StepPlan, StepResult
from penstock.core.request import Request


class Clock(Protocol):
    """Seconds from any fixed origin, never going back. Live: the machine's monotonic clock; tests: virtual time."""

    def now(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], None]) -> None: ...


class Wire(Protocol):
    """One end of a line between two state machines. `receive` gives what has arrived, without waiting."""

    def send(self, message: Any) -> None: ...

    def receive(self) -> Sequence[Any]: ...


class Executor(Protocol):
    """Runs plans in order. `depth` plans may be submitted before the first is collected.

    `feeds_back`: may a row depend on a token that a submitted plan is still sampling? True where one rank keeps its
    own tokens, False for pipeline stages.
    """

    depth: int
    feeds_back: bool

    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> StepResult: ...


class SchedulePolicy(Protocol):
    """Who goes first, and who gives way. `order` sorts waiting requests; both must be pure."""

    def order(self, requests: Iterable[Request], now: float) -> list[Request]: ...

    def victim(self, candidates: Sequence[Request], now: float) -> Request: ...


class DraftAllocator(Protocol):
    """How many drafts a request may have in its next row; 0 switches speculation off for it."""

    def num_draft(self, request: Request) -> int: ...
