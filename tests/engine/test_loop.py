"""The live loop end to end: an engine behind each wire with each executor, from the first message to Stopped."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.checks import check_idle, check_scheduler
from tests.fakes.executor import EOS_IDS, VOCAB_SIZE, FakeExecutor, HashModel, fake_layout

from penstock.core.plan import StepPlan, StepResult
from penstock.core.policy import PriorityPolicy
from penstock.core.request import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.loop import run_engine, turn
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    Drain,
    Failed,
    FromEngine,
    Progress,
    ResetPrefixCache,
    Stopped,
    ToEngine,
    Tokens,
)
from penstock.engine.ranks import InlineExecutor, ThreadExecutor
from penstock.engine.wire import dial, listen, local_pair

LAYOUT = fake_layout((None, 9), 4)
NUM_BLOCKS = (40, 40)


def rank(model: HashModel) -> Callable[[StepPlan], StepResult]:
    """One pretended rank as the callable that the executors run."""
    fake = FakeExecutor(LAYOUT, NUM_BLOCKS, model, depth=1)

    def run(plan: StepPlan) -> StepResult:
        fake.submit(plan)
        return fake.collect()

    return run


def make_engine(executor: Any) -> Engine:
    scheduler = Scheduler(LAYOUT, NUM_BLOCKS, SchedulerLimits(4, 16), PriorityPolicy(), feeds_back=executor.feeds_back)
    return Engine(scheduler, executor, EngineLimits(96, VOCAB_SIZE, EOS_IDS))


PROMPTS = {f"r{n}": list(range(20)) + [300 + n] * (n + 1) for n in range(8)}


def what_is_asked() -> list[ToEngine]:
    """Good requests, one bad, one cancelled at once; then the drain."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    asked: list[ToEngine] = [AddRequest(name, prompt, params, 5, 0.0) for name, prompt in PROMPTS.items()]
    long = SamplingParams(max_tokens=60, ignore_eos=True)  # over a wire the word to cancel comes some steps later
    asked += [AddRequest("bad", [], params, 5, 0.0), AddRequest("gone", [1] * 30, long, 5, 0.0)]
    return [*asked, CancelRequest("gone"), Drain(time.monotonic() + 60.0)]


def check_told(told: list[FromEngine], model: HashModel) -> None:
    """Everybody has its tokens alone and one end."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str | None] = {}
    for message in told:
        if isinstance(message, Tokens):
            for delta in message.deltas:
                assert delta.request_id not in ends
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                if delta.finish_reason is not None:
                    ends[delta.request_id] = delta.finish_reason
        elif isinstance(message, Failed):
            assert message.request_id not in ends
            ends[message.request_id] = str(message.code)
    assert ends == {**dict.fromkeys(PROMPTS, "length"), "bad": "400", "gone": "abort"}
    for name, prompt in PROMPTS.items():
        run = model.run(tuple(prompt), 5)
        assert tokens[name] == [run.token(len(prompt) + n) for n in range(12)]
    assert isinstance(told[-1], Stopped)


@pytest.mark.parametrize("kind", [InlineExecutor, ThreadExecutor])
def test_an_engine_in_this_process(kind: Any) -> None:
    model = HashModel(LAYOUT)
    executor = kind(rank(model))
    engine = make_engine(executor)
    front, wire = local_pair()
    for message in what_is_asked():
        front.send(message)
    for _ in range(500):
        turn(engine, executor, wire, time.monotonic)
        if engine.stopped:
            break
    executor.close()
    check_told(list(front.receive()), model)
    check_idle(engine.scheduler)


@pytest.mark.parametrize("kind", [InlineExecutor, ThreadExecutor])
def test_an_engine_behind_zmq(kind: Any) -> None:
    """`run_engine` in a thread of its own, as in the engine process; it ends by itself when drained."""
    model = HashModel(LAYOUT)
    executor = kind(rank(model))
    engine = make_engine(executor)
    front = listen()
    failures: list[BaseException] = []
    asked = threading.Event()

    def work() -> None:
        wire = dial(front.address)
        wire.send(Progress("load", 1, 1))  # from here on the front end's messages find somebody
        try:
            assert asked.wait(30.0)
            run_engine(engine, executor, wire, time.monotonic)
        except BaseException as error:
            failures.append(error)
        finally:
            wire.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    told: list[FromEngine] = []
    try:
        assert front.wait(30.0)
        assert front.receive()[0] == Progress("load", 1, 1)
        for message in what_is_asked():
            front.send(message)
        asked.set()
        deadline = time.monotonic() + 60.0
        while not any(isinstance(m, Stopped) for m in told) and time.monotonic() < deadline and not failures:
            front.wait(0.1)
            told += front.receive()
        thread.join(timeout=30.0)
        assert not failures
        assert not thread.is_alive()
    finally:
        front.close()
        executor.close()
    check_told(told, model)
    check_idle(engine.scheduler)


@pytest.mark.parametrize("kind", [InlineExecutor, ThreadExecutor])
def test_a_broken_executor_ends_the_loop_with_its_error(kind: Any) -> None:
    """The engine cannot go on, and its caller learns why."""
    good, num_plans = rank(HashModel(LAYOUT)), 0

    def run(plan: StepPlan) -> StepResult:
        nonlocal num_plans
        num_plans += 1
        if num_plans == 4:
            raise MemoryError("no memory on the device")
        return good(plan)

    executor = kind(run)
    front, wire = local_pair()
    for message in what_is_asked():
        front.send(message)
    with pytest.raises(MemoryError, match="on the device"):
        run_engine(make_engine(executor), executor, wire, time.monotonic)
    executor.close()


@settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([1, 2]), st.lists(st.integers(0, 16 * 64 - 1), min_size=10, max_size=80))
def test_every_request_ends_exactly_once(depth: int, tape: list[int]) -> None:
    """Messages in any order on virtual time: deadlines, cancels, failing rows, forgotten caches, ids used again."""
    model = HashModel(LAYOUT)
    executor = FakeExecutor(LAYOUT, NUM_BLOCKS, model, depth=depth)
    engine = make_engine(executor)
    ends: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    now = 0.0

    def tell(messages: list[FromEngine]) -> None:
        for message in messages:
            if isinstance(message, Failed) and message.code != 404:
                ends[message.request_id] += 1
            elif isinstance(message, Tokens):
                for delta in message.deltas:
                    assert delta.token_ids or delta.finish_reason is not None
                    ends[delta.request_id] += delta.finish_reason is not None
        check_scheduler(engine.scheduler)

    def step() -> None:
        nonlocal now
        tell(engine.launch(now))
        now += 1.0
        if engine.scheduler.num_submitted:
            tell(engine.complete(executor.collect(), now))

    for number in tape:
        kind, arg = number % 16, number // 16
        name = f"r{arg % 5}"
        if kind < 7:
            step()
        elif kind < 12:
            expected[name] += 1  # an id in use is refused, which ends this attempt
            prompt = [arg % 3] * (1 + arg % 40)
            params = SamplingParams(max_tokens=1 + arg % 20, prompt_logprobs=0 if arg % 7 == 0 else None)
            deadline = now + arg % 11 if arg % 4 == 0 else None
            tell(engine.handle(AddRequest(name, prompt, params, arg, now, deadline, priority=arg % 3), now))
        elif kind == 12:
            tell(engine.handle(CancelRequest(name), now))
        elif kind == 13:
            executor.failing.add(name)
        elif kind == 14:
            tell(engine.handle(ResetPrefixCache(), now))
        else:
            now += arg % 7
    for _ in range(1000):
        if not engine.has_work:
            break
        step()
    assert ends == expected
    check_idle(engine.scheduler)
    assert not engine._deadlines
    assert not engine._prompt_logprobs
    assert not engine._submitted_s
    assert not engine.timeline._tracks
