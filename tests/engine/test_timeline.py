"""Where a request's time went: spans without holes or overlaps, and why its prompt missed the cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tests.fakes.executor import EOS_IDS, VOCAB_SIZE, FakeExecutor, HashModel, fake_layout

from penstock.core.moves import KVMove, MoveResult, Place
from penstock.core.policy import FcfsPolicy
from penstock.core.request import Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.core.traffic import Offer
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import AddRequest, CancelRequest, FromEngine, RequestRecord, Tokens
from penstock.engine.timeline import MAX_SPANS

BLOCK = 4


class Clocked:
    """An engine whose steps take one second; records of what ended."""

    def __init__(self, num_blocks: int, *, depth: int = 1, step_tokens: int = 32, max_num_seqs: int = 4) -> None:
        layout = fake_layout((None,), BLOCK)
        self.executor = FakeExecutor(layout, (num_blocks,), HashModel(layout), depth=depth)
        limits = SchedulerLimits(max_num_seqs, step_tokens)
        self.scheduler = Scheduler(layout, (num_blocks,), limits, FcfsPolicy())
        self.engine = Engine(self.scheduler, self.executor, EngineLimits(96, VOCAB_SIZE, EOS_IDS))
        self.now = 0.0
        self.records: dict[str, RequestRecord] = {}

    def add(self, name: str, prompt: list[int], output: int, prompt_logprobs: int | None = None) -> None:
        params = SamplingParams(max_tokens=output, ignore_eos=True, prompt_logprobs=prompt_logprobs)
        assert not self.engine.handle(AddRequest(name, prompt, params, 1, self.now), self.now)

    def note(self, messages: list[FromEngine]) -> None:
        for message in messages:
            if isinstance(message, Tokens):
                for delta in message.deltas:
                    if delta.record is not None:
                        self.records[delta.request_id] = delta.record

    def run(self, num_turns: int = 500) -> None:
        for _ in range(num_turns):
            self.note(self.engine.launch(self.now))
            self.now += 1.0
            if self.scheduler.num_submitted:
                result = self.executor.collect()
                result.seconds = 1.0
                self.note(self.engine.complete(result, self.now))
            if not self.engine.has_work:
                return


def check_spans(record: RequestRecord) -> list[str]:
    """From arrival to the end, one after the other; the kinds."""
    spans = record.spans
    assert record.finish_s is not None
    assert spans[0].start_s == record.arrival_s
    assert spans[-1].end_s == record.finish_s
    for span in spans:
        assert span.end_s is not None
        assert span.start_s <= span.end_s
    for one, two in pairwise(spans):
        assert one.end_s is not None
        assert one.end_s <= two.start_s, f"{one} and {two} overlap"
    return [span.kind for span in spans]


def test_a_chunked_prompt_shows_each_chunk() -> None:
    world = Clocked(64, step_tokens=8)
    world.add("a", list(range(20)), 4)
    world.run()
    record = world.records["a"]
    assert check_spans(record) == ["queue", "prefill", "prefill", "prefill", "decode"]
    assert [span.num_tokens for span in record.spans] == [0, 8, 8, 4, 0]
    assert (record.admitted_s, record.first_token_s, record.finish_s) == (0.0, 3.0, 6.0)


def test_a_very_long_prompt_keeps_a_bounded_record() -> None:
    """Later chunks are joined; no token is lost from the sum."""
    world = Clocked(64, step_tokens=4)
    world.add("a", list(range(80)), 2)
    world.run()
    record = world.records["a"]
    assert len(check_spans(record)) <= MAX_SPANS
    assert sum(span.num_tokens for span in record.spans) == 80


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_is_a_span_of_its_own(depth: int) -> None:
    """Preempted with a row in flight or not: the spans neither overlap nor stay open."""
    world = Clocked(7, depth=depth)
    for _ in range(1000):
        world.scheduler.peak.finished(1)  # expects short outputs, so that both are let in and one must give way
    world.add("a", [1] * 5, 14)
    world.add("b", [2] * 5, 14)
    world.run()
    kinds = {name: check_spans(record) for name, record in world.records.items()}
    preempted = [name for name in kinds if "preempted" in kinds[name]]
    assert preempted
    for name in preempted:
        assert world.records[name].num_preemptions == kinds[name].count("preempted") > 0
        after = kinds[name][kinds[name].index("preempted") + 1 :]
        assert after == ["prefill", "decode"] * (len(after) // 2) or "preempted" in after


def test_a_prefill_in_flight_when_its_blocks_are_taken_does_not_count() -> None:
    """Depth 2: the step that computes the chunk ends after the preemption, which stays open until the resumption."""
    world = Clocked(64, depth=2, step_tokens=8)
    world.add("a", list(range(20)), 3)
    world.note(world.engine.launch(0.0))
    world.now = 1.0
    world.scheduler._preempt(world.scheduler.requests["a"], world.now)
    world.run()
    kinds = check_spans(world.records["a"])
    assert kinds[:2] == ["queue", "preempted"]
    assert kinds[-1] == "decode"
    assert kinds.count("preempted") == 1


def test_a_request_cancelled_while_it_waits_has_a_queue_span() -> None:
    world = Clocked(64, max_num_seqs=1)
    world.add("a", [1, 2], 9)
    world.add("b", [3, 4], 9)
    world.run(3)
    world.note(world.engine.handle(CancelRequest("b"), world.now))
    record = world.records["b"]
    assert (record.state, record.queue_reason, record.admitted_s) == ("aborted", "slots", None)
    assert check_spans(record) == ["queue"]


def test_prompt_logprobs_are_why_a_cached_prompt_is_computed() -> None:
    world = Clocked(64)
    world.add("a", list(range(20)), 2)
    world.run()
    world.add("b", list(range(20)), 2, prompt_logprobs=1)
    world.run()
    miss = world.records["b"].miss
    assert miss is not None
    assert (miss.reason, miss.at_token) == ("disabled", 0)
    assert "log prob" in miss.detail


# ---- where the prompt's KV came from ----


def test_each_prompt_token_has_one_source() -> None:
    """Cache, then computing; a block computed again after a preemption counts once."""
    world = Clocked(64)
    world.add("a", list(range(20)), 3)
    world.run()
    world.add("b", [*range(12), 90, 91, 92], 3)
    world.run()
    assert world.records["a"].sources == [("compute", 20)]
    assert world.records["b"].sources == [("device", 12), ("compute", 3)]
    assert dict(world.engine.timeline.by_source) == {"device": 12, "compute": 23}


def test_what_is_computed_again_after_a_preemption_counts_once() -> None:
    world = Clocked(7)
    for _ in range(1000):
        world.scheduler.peak.finished(1)
    world.add("a", [1] * 5, 14)
    world.add("b", [2] * 5, 14)
    world.run()
    assert any(record.num_preemptions for record in world.records.values())
    assert world.engine.timeline.by_source["compute"] == 10


class OneLoad:
    """A source that offers the first 16 tokens of every prompt from host memory, and the mover that brings them.

    `is_cache`: the scheduler lets steps begin behind them at once.
    """

    def __init__(self, world: Clocked, is_cache: bool, num_turns: int) -> None:
        self.world, self.is_cache, self.num_turns = world, is_cache, num_turns
        self.waiting: list[int] = []
        world.scheduler.source = self
        world.engine.mover = self
        world.executor.load = lambda id_: True

    def offer(self, request: Request, num_blocks: int, now: float) -> Offer | str | None:
        return None if num_blocks else Offer(16, Place("host"), request.id, is_cache=self.is_cache)

    def start(self, move: KVMove) -> None:
        self.waiting += [move.id] * self.num_turns

    def poll(self) -> list[MoveResult]:
        ended = [self.waiting.pop()] if self.waiting else []
        return [MoveResult(id_) for id_ in ended if id_ not in self.waiting]

    def expect(self, move_id: int, num_units: int, checksum: int) -> None: ...

    def cancel(self, move_id: int) -> None: ...


@pytest.mark.parametrize("num_turns", [1, 3])
@pytest.mark.parametrize("is_cache", [False, True])
def test_a_load_is_a_span_and_a_source(is_cache: bool, num_turns: int) -> None:
    world = Clocked(64, step_tokens=8)
    OneLoad(world, is_cache, num_turns)
    world.add("a", list(range(30)), 4)
    world.engine.launch(0.0)
    assert world.engine.timeline.record(world.scheduler.requests["a"]).state == "loading"
    world.run()
    record = world.records["a"]
    assert check_spans(record) == ["queue", "load", "prefill", "prefill", "decode"]
    load = record.spans[1]
    assert (load.place, load.num_tokens) == ("host", 16)
    assert sum(span.num_tokens for span in record.spans if span.kind == "prefill") == 14
    assert record.sources == [("host", 16), ("compute", 14)]
    assert dict(world.engine.timeline.by_source) == {"host": 16, "compute": 14}
