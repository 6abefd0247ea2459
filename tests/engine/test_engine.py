"""One engine on virtual time: messages in, tokens and records out. The rank is pretended, all else is real."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.executor import EOS_IDS, VOCAB_SIZE, FakeExecutor, HashModel, fake_layout

from penstock.core.policy import FcfsPolicy
from penstock.core.request import Request, SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.loop import turn
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    Drain,
    Explain,
    Failed,
    FromEngine,
    Record,
    Report,
    ResetPrefixCache,
    Stopped,
    TokenDelta,
    Tokens,
    Watch,
)
from penstock.engine.ranks import InlineExecutor, ThreadExecutor
from penstock.engine.wire import local_pair

BLOCK, MODEL_LEN = 4, 96


class World:
    """An engine, its two ends of a wire and a clock that moves by one second a turn."""

    def __init__(self, num_blocks: int = 64, *, depth: int = 1, caching: bool = True, step_tokens: int = 32) -> None:
        layout = fake_layout((None,), BLOCK)
        self.model = HashModel(layout)
        self.executor = FakeExecutor(layout, (num_blocks,), self.model, depth=depth, feeds_back=True)
        limits = SchedulerLimits(4, step_tokens)
        scheduler = Scheduler(layout, (num_blocks,), limits, FcfsPolicy(), prefix_caching=caching)
        self.engine = Engine(scheduler, self.executor, EngineLimits(MODEL_LEN, VOCAB_SIZE, EOS_IDS))
        self.front, self.wire = local_pair()
        self.now = 0.0
        self.seen: list[FromEngine] = []

    def add(self, request_id: str, prompt: list[int], deadline_s: float | None = None, **params: Any) -> None:
        own = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
        self.front.send(AddRequest(request_id, prompt, own, 5, self.now, deadline_s))

    def turn(self) -> list[FromEngine]:
        self.now += 1.0
        turn(self.engine, self.executor, self.wire, lambda: self.now)
        messages = self.front.receive()
        self.seen += messages
        return messages

    def run(self, bound: int = 500) -> None:
        for _ in range(bound):
            self.turn()
            if not self.engine.has_work:
                return
        raise AssertionError("the engine does not come to an end")

    def deltas(self, request_id: str) -> list[TokenDelta]:
        return [d for m in self.seen if isinstance(m, Tokens) for d in m.deltas if d.request_id == request_id]

    def tokens(self, request_id: str) -> list[int]:
        return [token for delta in self.deltas(request_id) for token in delta.token_ids]

    def solo(self, prompt: list[int], num: int) -> list[int]:
        run = self.model.run(tuple(prompt), 5)
        return [run.token(len(prompt) + n) for n in range(num)]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_gets_its_solo_tokens_and_one_record(depth: int) -> None:
    world = World(depth=depth)
    prompts = {f"r{n}": list(range(n, n + 9 + n)) for n in range(6)}
    for request_id, prompt in prompts.items():
        world.add(request_id, prompt)
    world.run()
    for request_id, prompt in prompts.items():
        assert world.tokens(request_id) == world.solo(prompt, 8)
        *before, last = world.deltas(request_id)
        assert all(d.finish_reason is None and d.record is None for d in before)
        assert last.finish_reason == "length"
        record = last.record
        assert record is not None
        assert (record.state, record.prompt_tokens, record.generation_tokens) == ("finished", len(prompt), 8)
        assert record.spans[0].kind == "queue"
        assert record.spans[-1].kind == "decode"
        assert record.finish_s is not None
        assert all(span.end_s is not None and span.start_s <= span.end_s <= record.finish_s for span in record.spans)


def test_stop_ids_end_tokens_and_the_tokenizers_own() -> None:
    """stop_token_ids and both kinds of end tokens stop; ignore_eos ignores the latter; min_tokens holds all off."""
    world = World()
    prompt = list(range(10))
    first, second = world.solo(prompt, 2)
    world.add("stop", prompt, stop_token_ids=(second,))
    world.add("min", prompt, stop_token_ids=(first,), min_tokens=3)
    own = SamplingParams(max_tokens=8)
    world.front.send(AddRequest("end", prompt, own, 5, 0.0, end_ids=(second,)))
    deaf = SamplingParams(max_tokens=8, ignore_eos=True)
    world.front.send(AddRequest("ignored", prompt, deaf, 5, 0.0, end_ids=(second,)))
    world.run()
    last = world.deltas("stop")[-1]
    assert (world.tokens("stop"), last.finish_reason, last.stop_reason) == ([first, second], "stop", second)
    assert len(world.tokens("min")) > 3
    last = world.deltas("end")[-1]
    assert (world.tokens("end"), last.finish_reason, last.stop_reason) == ([first, second], "stop", None)
    assert len(world.tokens("ignored")) == 8


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        (list(range(MODEL_LEN)), f"{MODEL_LEN} tokens"),
        ([1, VOCAB_SIZE], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
    ],
)
def test_bad_requests_fail_and_harm_nobody(prompt: list[int], words: str) -> None:
    world = World()
    world.add("good", [1, 2, 3])
    world.add("bad", prompt)
    world.add("good", [4, 5])  # the id is in use
    world.run()
    failed = [m for m in world.seen if isinstance(m, Failed)]
    assert [(m.request_id, m.code) for m in failed] == [("bad", 400), ("good", 400)]
    assert words in failed[0].message
    assert world.tokens("good") == world.solo([1, 2, 3], 8)


def test_a_failing_row_ends_its_request_alone() -> None:
    world = World()
    world.add("a", [1, 2, 3])
    world.add("b", [4, 5, 6])
    world.turn()
    world.executor.failing.add("a")
    world.run()
    assert [(m.request_id, m.code) for m in world.seen if isinstance(m, Failed)] == [("a", 500)]
    assert world.tokens("b") == world.solo([4, 5, 6], 8)


@pytest.mark.parametrize("depth", [1, 2])
def test_cancel_frees_blocks_and_says_so(depth: int) -> None:
    world = World(depth=depth)
    world.add("a", list(range(30)), max_tokens=50)
    for _ in range(3):
        world.turn()
    world.front.send(CancelRequest("a", "stop", "###"))
    world.front.send(CancelRequest("nobody"))
    world.run()
    last = world.deltas("a")[-1]
    assert (last.finish_reason, last.stop_reason, last.token_ids) == ("stop", "###", [])
    pool = world.engine.scheduler.pools[0]
    assert (pool.num_held, pool.num_limbo) == (0, 0)


def test_a_deadline_ends_waiting_and_running_requests() -> None:
    world = World()
    world.add("late", list(range(8)), deadline_s=4.0, max_tokens=40)
    world.add("fine", list(range(20, 28)), max_tokens=5)
    world.run()
    assert [(m.request_id, m.code) for m in world.seen if isinstance(m, Failed)] == [("late", 504)]
    assert len(world.tokens("fine")) == 5


def test_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    world = World()
    world.add("a", [1, 2, 3])
    world.turn()
    world.front.send(Drain(1000.0))
    world.add("b", [1, 2, 3])
    world.run()
    world.turn()
    assert world.tokens("a") == world.solo([1, 2, 3], 8)
    assert [(m.request_id, m.code) for m in world.seen if isinstance(m, Failed)] == [("b", 503)]
    assert sum(isinstance(m, Stopped) for m in world.seen) == 1
    assert world.engine.stopped


def test_drain_aborts_what_takes_too_long() -> None:
    world = World()
    world.add("a", [1, 2, 3], max_tokens=80)
    world.turn()
    world.front.send(Drain(4.0))
    for _ in range(10):
        world.turn()
    assert world.deltas("a")[-1].finish_reason == "abort"
    assert world.engine.stopped
    assert sum(isinstance(m, Stopped) for m in world.seen) == 1


def test_prompt_logprobs_come_once_with_the_first_token() -> None:
    """Also when the prompt is cut into chunks and its blocks are cached."""
    world = World(step_tokens=5)
    prompt = list(range(13))
    world.add("warm", prompt)
    world.run()
    world.add("a", prompt, prompt_logprobs=0)
    world.run()
    with_them = [d for d in world.deltas("a") if d.prompt_logprobs is not None]
    assert len(with_them) == 1
    assert with_them[0] is world.deltas("a")[0]
    found = with_them[0].prompt_logprobs
    assert found is not None
    assert found[0] is None
    request = Request("a", prompt, len(prompt), SamplingParams(), 5, 20)
    assert found[1:] == world.model.solo_prompt_logprobs(request)


def misses(world: World, request_id: str) -> tuple[str, int]:
    record = world.deltas(request_id)[-1].record
    assert record is not None
    assert record.miss is not None
    assert record.miss.detail
    return record.miss.reason, record.miss.at_token


def test_why_the_cache_missed() -> None:
    world = World(num_blocks=16)
    base = list(range(20))
    for request_id, prompt in (
        ("first", base),
        ("tail", base),
        ("diverged", base[:12] + [99] * 8),
        ("filler", list(range(1000, 1044))),
        ("evicted", base),
    ):
        world.add(request_id, prompt, max_tokens=1)
        world.run()
    assert misses(world, "first") == ("first_seen", 0)
    assert misses(world, "tail") == ("tail", 16)
    assert misses(world, "diverged") == ("diverged", 12)
    assert misses(world, "evicted")[0] == "evicted"
    world.front.send(ResetPrefixCache())
    world.add("forgotten", base, max_tokens=1)
    world.run()
    assert misses(world, "forgotten") == ("first_seen", 0)
    off = World(caching=False)
    off.add("a", base)
    off.run()
    assert misses(off, "a") == ("disabled", 0)


def test_explain_knows_live_requests_only() -> None:
    world = World()
    world.add("a", list(range(9)))
    world.turn()
    world.front.send(Explain("a"))
    world.front.send(Explain("b"))
    found = world.turn()
    record = next(m.record for m in found if isinstance(m, Record))
    assert (record.request_id, record.state) == ("a", "decode")
    assert [m.code for m in found if isinstance(m, Failed)] == [404]


def test_reports_count_every_block_once() -> None:
    """The five states sum to the pool, and the map says the same as the counts."""
    world = World()
    shared = list(range(16))
    for n in range(6):
        world.add(f"r{n}", shared + [100 + n] * (3 + n), max_tokens=20)
    seen_states: set[str] = set()
    for _ in range(60):
        world.front.send(Watch(world.now + 5.0))
        for report in (m for m in world.turn() if isinstance(m, Report)):
            kv = report.kv
            counts = {"u": kv.used, "s": kv.shared, "f": kv.filling, "c": kv.cached, ".": kv.free}
            assert sum(counts.values()) == kv.num_blocks == 63
            drawn = dict.fromkeys("usfc.", 0)
            cells = kv.cells
            while cells:
                letter, digits = cells[0], ""
                cells = cells[1:]
                while cells and cells[0].isdigit():
                    digits, cells = digits + cells[0], cells[1:]
                drawn[letter] += int(digits)
            assert drawn == counts
            assert len(report.requests) == report.num_running + report.num_waiting
            seen_states |= {letter for letter, count in counts.items() if count}
    assert seen_states == set("usfc.")


def test_the_thread_executor_keeps_order_and_hands_errors_on() -> None:
    """Depth 2: plans in order; an exception reaches the collect of its plan and every later one."""
    layout = fake_layout((None,), BLOCK)
    fake = FakeExecutor(layout, (64,), HashModel(layout))
    calls = 0

    def run(plan: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the device is gone")
        fake.submit(plan)
        return fake.collect()

    for kind, depth in ((InlineExecutor, 1), (ThreadExecutor, 2)):
        calls = 0
        fake = FakeExecutor(layout, (64,), HashModel(layout))
        executor = kind(run)
        assert executor.depth == depth
        scheduler = Scheduler(layout, (64,), SchedulerLimits(4, 32), FcfsPolicy())
        scheduler.add(Request("a", [1, 2, 3], 3, SamplingParams(), 0, 20))
        steps = []
        with pytest.raises(RuntimeError, match="the device is gone"):
            for _ in range(20):
                while scheduler.num_submitted < depth:
                    plan = scheduler.plan(0.0)
                    assert plan is not None
                    executor.submit(plan)
                result = executor.collect()
                steps.append(result.step)
                scheduler.commit(result, 0.0)
        assert steps == [0, 1]
        if depth == 2:
            with pytest.raises(RuntimeError):
                executor.collect()
        executor.close()
