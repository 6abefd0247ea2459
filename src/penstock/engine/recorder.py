"""Every scheduler input, in order, with its time: written as it happens, replayed to the same plans byte for byte.

File: msgpack objects one behind the other, a header first. Knows the scheduler's inputs; knows no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from penstock.config.model import KVLayout
from penstock.core.plan import StepPlan, StepResult
from penstock.core.policy import POLICIES
from penstock.core.request import MediaItem, Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import Progress, SchedulerLimits

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


class RecordingScheduler(Scheduler):
    """A scheduler that writes down what it is told and what it plans."""

    def __init__(self, setup: Setup, file: BinaryIO) -> None:
        super().__init__(**setup._arguments())
        self._file = file
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

    def plan(self, now: float) -> StepPlan | None:
        plan = super().plan(now)
        self._write("plan", now, encode_plan(plan))
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
    """Feed a recording to a fresh scheduler; the number of plans, all equal. Raises ReplayMismatch."""
    records = _read(Path(path))
    kind, setup = next(records)
    assert kind == "setup"
    scheduler = _typed(setup, Setup).build()
    num_plans = 0
    for kind, *rest in records:
        if kind == "plan":
            now, expected = rest
            if encode_plan(scheduler.plan(now)) != expected:
                raise ReplayMismatch(f"plan {num_plans} differs")
            num_plans += 1
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
