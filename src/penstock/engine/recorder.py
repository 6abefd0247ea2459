"""Every scheduler input, in order, with its time: written as it happens, replayed to the same plans byte for byte.

File: msgpack objects one behind the other, a header first. Knows the scheduler's inputs; knows no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from penstock.config.model import KVLayout
from penstock.core.doors import KVSource
from penstock.core.moves import KVMove, KVTicket, MoveResult, Place
from penstock.core.plan import StepPlan, StepResult
from penstock.core.policy import POLICIES
from penstock.core.request import MediaItem, Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import Given, Progress, SchedulerLimits
from penstock.core.traffic import Offer, Traffic

T = TypeVar("T")

_encode = msgspec.msgpack.Encoder(order="deterministic").encode


class Setup(msgspec.Struct, frozen=True):
    """What a scheduler is built from."""

    layout: KVLayout
    num_blocks: tuple[int, ...]
    limits: SchedulerLimits
    policy: str
    model_id: str
    prefix_caching: bool
    feeds_back: bool

    def build(self) -> Scheduler:
        return Scheduler(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "num_blocks": self.num_blocks,
            "limits": self.limits,
            "policy": POLICIES[self.policy](),
            "model_id": self.model_id,
            "prefix_caching": self.prefix_caching,
            "feeds_back": self.feeds_back,
        }


class _Added(msgspec.Struct, frozen=True):
    """A request as it was added."""

    id: str
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int
    max_total: int
    stop_ids: frozenset[int]
    arrival_s: float
    deadline_s: float | None
    priority: int
    adapter: str
    salt: str
    media: tuple[MediaItem, ...]
    ticket: KVTicket | None


class _HeardSource:
    """A source whose answers are written down."""

    def __init__(self, source: KVSource, write: Callable[..., None]) -> None:
        self._source, self._write = source, write

    def offer(self, request: Request, num_blocks: int, now: float) -> Offer | str | None:
        answer = self._source.offer(request, num_blocks, now)
        self._write("offer", request.id, num_blocks, _plain(answer))
        return answer


class _ToldSource:
    """A source that says again what was written down."""

    def __init__(self) -> None:
        self.answers: deque[tuple[str, int, Any]] = deque()

    def offer(self, request: Request, num_blocks: int, now: float) -> Offer | str | None:
        if not self.answers:
            raise ReplayMismatch(f"{request.id} asks for KV where nobody asked")
        request_id, num_known, answer = self.answers.popleft()
        if (request_id, num_known) != (request.id, num_blocks):
            raise ReplayMismatch(f"{request.id} asks behind {num_blocks} blocks, {request_id} did behind {num_known}")
        return _typed(answer, Offer) if isinstance(answer, dict) else answer


class _RecordedTraffic(Traffic):
    """Traffic that remembers the moves of a plan, and writes down the saves: those nobody else hears of."""

    def __init__(self, scheduler: Scheduler, write: Callable[..., None]) -> None:
        super().__init__(scheduler.kv)
        self._write = write
        self._new: list[KVMove] = []

    def save(self, src: Place, dst: Place) -> KVMove:
        self._write("save", _plain(src), _plain(dst))
        return super().save(src, dst)

    def _start(self, *arguments: Any) -> KVMove:
        move = super()._start(*arguments)
        self._new.append(move)
        return move

    def taken(self) -> list[KVMove]:
        """Started since the last call."""
        new, self._new = self._new, []
        return new


class RecordingScheduler(Scheduler):
    """A scheduler that writes down what it is told, what its source answers, what it plans and what it moves."""

    def __init__(self, setup: Setup, file: BinaryIO) -> None:
        super().__init__(**setup._arguments())
        self._file = file
        self._moves = self.traffic = _RecordedTraffic(self, self._write)
        self._write("setup", _plain(setup))

    def add(self, request: Request) -> None:
        added = _Added(**{name: getattr(request, name) for name in _Added.__struct_fields__})
        self._write("add", _plain(added))
        super().add(request)

    def finish(self, request_id: str, reason: str, now: float) -> Request | None:
        self._write("finish", request_id, reason, now)
        return super().finish(request_id, reason, now)

    def hold_at(self, request_id: str, gate: str, position: int) -> None:
        self._write("hold_at", request_id, gate, position)
        super().hold_at(request_id, gate, position)

    def arrive(self, gate: str) -> None:
        self._write("arrive", gate)
        super().arrive(gate)

    def fail(self, gate: str, now: float) -> list[Request]:
        self._write("fail", gate, now)
        return super().fail(gate, now)

    def forget_cache(self) -> None:
        self._write("forget_cache")
        super().forget_cache()

    def give(self, request_id: str, position: int, given: Given, now: float) -> Progress | None:
        self._write("give", request_id, position, _plain(given), now)
        return super().give(request_id, position, given, now)

    def moved(self, result: MoveResult, now: float) -> None:
        self._write("moved", _plain(result), now)
        super().moved(result, now)

    def plan(self, now: float) -> StepPlan | None:
        source = self.source
        if source is not None:
            self.source = _HeardSource(source, self._write)
        try:
            plan = super().plan(now)
        finally:
            self.source = source
        self._write("plan", now, encode_plan(plan), _encode(_plain(self._moves.taken())))
        return plan

    def commit(self, result: StepResult, now: float) -> list[Progress]:
        self._write("commit", now, _plain(result))
        return super().commit(result, now)

    def _write(self, *record: Any) -> None:
        data = _encode(record)
        self._file.write(len(data).to_bytes(4, "little") + data)


def encode_plan(plan: StepPlan | None) -> bytes:
    """A plan as bytes: equal plans give equal bytes."""
    return _encode(_plain(plan))


class ReplayMismatch(Exception):
    """Replaying a recording gave another plan."""


def replay(path: str | Path) -> int:
    """Feed a recording to a fresh scheduler; the number of plans, all equal with their moves. Raises ReplayMismatch."""
    records = _read(Path(path))
    kind, setup = next(records)
    assert kind == "setup"
    scheduler = _typed(setup, Setup).build()
    scheduler.traffic = traffic = _RecordedTraffic(scheduler, lambda *record: None)
    told = _ToldSource()
    num_plans = 0
    for kind, *rest in records:
        if kind == "plan":
            now, expected, moves = rest
            scheduler.source = told if told.answers else None
            if encode_plan(scheduler.plan(now)) != expected or told.answers:
                raise ReplayMismatch(f"plan {num_plans} differs")
            if _encode(_plain(traffic.taken())) != moves:
                raise ReplayMismatch(f"plan {num_plans} moves something else")
            num_plans += 1
        elif kind == "offer":
            told.answers.append(tuple(rest))
        elif kind == "moved":
            scheduler.moved(_typed(rest[0], MoveResult), rest[1])
        elif kind == "give":
            scheduler.give(rest[0], rest[1], _typed(rest[2], Given), rest[3])
        elif kind == "save":
            traffic.save(_typed(rest[0], Place), _typed(rest[1], Place))
        elif kind == "commit":
            now, result = rest
            scheduler.commit(_typed(result, StepResult), now)
        elif kind == "add":
            added = _typed(rest[0], _Added)
            scheduler.add(Request(**{name: getattr(added, name) for name in _Added.__struct_fields__}))
        else:
            getattr(scheduler, kind)(*rest)
    return num_plans


def _plain(value: Any) -> Any:
    """As lists and dictionaries whose order does not depend on how they were built; integer keys become strings."""
    return msgspec.to_builtins(value, str_keys=True, order="deterministic")


def _typed(value: Any, type_: type[T]) -> T:
    """Back from `_plain`."""
    return msgspec.convert(value, type_, strict=False, str_keys=True)


def _read(path: Path) -> Iterator[Any]:
    """Records of a file; a last one cut short by a crash is left out."""
    data = path.read_bytes()
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data):
            return
        yield msgspec.msgpack.decode(data[at + 4 : at + 4 + size])
        at += 4 + size
