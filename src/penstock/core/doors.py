"""The protocols behind which features live: one to four methods each. Names no class that implements them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from penstock.core.cost import FloatArray, IntArray, StepShape
from penstock.core.kv_index import KVIndex
from penstock.core.moves import KVMove, MoveResult
from penstock.core.plan import StepPlan, StepResult
from penstock.core.request import Request
from penstock.core.routing import Choice, EngineViews, RouteRequest
from penstock.core.traffic import Offer


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


class Mover(Protocol):
    """Carries KV between this engine's device and everywhere else, beside the steps.

    No method waits or raises for what befalls a move: that is in its result, of which each move gets exactly one.
    """

    def start(self, move: KVMove) -> None: ...

    def expect(self, move_id: int, num_units: int, checksum: int) -> None:
        """Of a receipt: it is complete when so much, with this sum, has arrived, before this call or after it."""
        ...

    def cancel(self, move_id: int) -> None:
        """End it soon. Its result follows, with an error unless it was complete already."""
        ...

    def poll(self) -> Sequence[MoveResult]:
        """What has ended since the last call."""
        ...


class KVSource(Protocol):
    """Where else than from this engine's own steps the KV of a prompt's beginning may come."""

    def offer(self, request: Request, num_blocks: int, now: float) -> Offer | str | None:
        """For a request that is about to be admitted with `num_blocks` blocks from the device's cache: what can come,
        None when nothing (more) can, or why it must be asked again later, as a reason of waiting."""
        ...


class Store(Protocol):
    """Bytes of a tier: blocks page-first (`KVGroup.extent`), found by their hash.

    May block: it is called from a thread of its tier, never from a step loop. A block whose checksum fails is missing.
    """

    def read(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[bool]:
        """Fill the buffers of those that are there, whole and unharmed."""
        ...

    def write(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> list[bool]:
        """Which were stored: a full or failing store says no, it does not raise."""
        ...

    def delete(self, keys: Sequence[bytes]) -> None: ...


class SchedulePolicy(Protocol):
    """Who goes first, and who gives way. `order` sorts waiting requests; both must be pure.

    `ages`: the order of those that wait changes with time alone.
    """

    ages: bool

    def order(self, requests: Iterable[Request], now: float) -> list[Request]: ...

    def victim(self, candidates: Sequence[Request], now: float) -> Request: ...


class DraftAllocator(Protocol):
    """How many drafts a request may have in its next row; 0 switches speculation off for it."""

    def num_draft(self, request: Request) -> int: ...


class CostModel(Protocol):
    """Predicts seconds. More of a prompt in place never costs more; moves are affine in their bytes."""

    def step_seconds(self, shape: StepShape) -> float: ...

    def prefill_seconds(self, new_tokens: int, prefix_tokens: int) -> float:
        """Of a prompt of which `prefix_tokens` are in place, alone on an engine."""
        ...

    def prefill_seconds_each(self, new_tokens: IntArray, prefix_tokens: IntArray) -> FloatArray:
        """The same for many prompts at once: a router asks for every engine."""
        ...

    def move_seconds(self, num_bytes: int, tier: str) -> float: ...


class RoutePolicy(Protocol):
    """Chooses an engine: for a prompt, or for a decode. Changes nothing but its own counters and generator."""

    def pick(self, request: RouteRequest, engines: EngineViews, index: KVIndex, now: float) -> Choice | None:
        """None: no engine can take it now."""
        ...
