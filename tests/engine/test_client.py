"""The front end over a scripted engine in the same thread: text, stops, limits, cancels, errors, records, observers."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.scripted_engine import ScriptedEngine, token_at
from tests.server.tiny_model import VOCAB_SIZE, tiny_tokenizer

from penstock.core.request import ParamsError, SamplingParams, child_seed
from penstock.engine.client import MAX_RECORDS, FrontEnd, Output, RequestError
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    Drain,
    Explain,
    Failed,
    Fatal,
    FromEngine,
    RequestRecord,
    Stopped,
    ToEngine,
)

TOKENIZER = tiny_tokenizer()
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


class Log:
    """An observer that writes down what it sees."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def received(self, request_id: str, num_prompt_tokens: int, params: SamplingParams, now: float) -> None:
        self.events.append(("received", request_id, num_prompt_tokens, params.n))

    def emitted(self, request_id: str, num_new_tokens: int, now: float) -> None:
        self.events.append(("emitted", request_id, num_new_tokens))

    def finished(self, request_id: str, record: RequestRecord | None, finish_reason: str, now: float) -> None:
        self.events.append(("finished", request_id, finish_reason, record is not None))

    def rejected(self, reason: str, now: float) -> None:
        self.events.append(("rejected", reason))

    def message(self, message: FromEngine, now: float) -> None:
        pass

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]


class Bench:
    """A front end and an engine on virtual time; messages go to and fro when `step` is called."""

    def __init__(self, engine: ScriptedEngine | None = None, **options: Any) -> None:
        self.engine = engine or ScriptedEngine()
        self.now = 100.0
        self.to_engine: list[ToEngine] = []
        self.log = Log()
        self.front = FrontEnd(self.to_engine.append, TOKENIZER, VOCAB_SIZE, observers=(self.log,), **options)
        self.outputs: dict[str, list[Output]] = defaultdict(list)
        self.give(self.engine.ready())

    def give(self, *messages: FromEngine) -> list[Output]:
        outputs = [output for message in messages for output in self.front.handle(message, self.now)]
        for output in outputs:
            self.outputs[output.request_id].append(output)
        return outputs

    def step(self) -> list[Output]:
        self.now += 0.01
        waiting, self.to_engine[:] = list(self.to_engine), []
        answers = [answer for message in waiting for answer in self.engine.handle(message, self.now)]
        return self.give(*answers, *self.engine.step(self.now))

    def run(self) -> None:
        """Until nothing is in flight and everything is confirmed."""
        for _ in range(10_000):
            if not self.front.requests and not self.to_engine and not self.engine.requests:
                return
            self.step()
        raise AssertionError("requests never end")

    def submit(self, request_id: str, prompt: str | list[int], params: SamplingParams = GREEDY, **extra: Any) -> None:
        ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
        self.front.submit(request_id, ids, params, self.now, **extra)

    def text(self, request_id: str, index: int = 0) -> str:
        return "".join(output.text for output in self.outputs[request_id] if output.index == index)

    def token_ids(self, request_id: str, index: int = 0) -> list[int]:
        return [t for output in self.outputs[request_id] if output.index == index for t in output.token_ids]

    def end(self, request_id: str, index: int = 0) -> Output:
        ends = [o for o in self.outputs[request_id] if o.index == index and o.finish_reason is not None]
        assert len(ends) == 1, "a sample ends exactly once"
        assert ends[0] is [o for o in self.outputs[request_id] if o.index == index][-1], "and says nothing after"
        return ends[0]


def test_a_request_gives_text_counts_and_a_record() -> None:
    bench = Bench()
    bench.submit("a", "Once upon a time")
    live = bench.front.requests["a"]
    bench.run()
    ids = TOKENIZER.encode("Once upon a time")
    wanted = [ids[i % len(ids)] for i in range(8)]
    assert bench.token_ids("a") == wanted
    assert bench.text("a") == TOKENIZER.decode(wanted)
    assert (bench.end("a").finish_reason, bench.end("a").is_last) == ("length", True)
    assert (live.num_generated, live.num_cached) == (8, 3)
    assert bench.front.records["a"].generation_tokens == 8
    assert bench.log.events[0] == ("received", "a", len(ids), 1)
    assert bench.log.of("emitted") == [("emitted", "a", 1)] * 8
    assert bench.log.of("finished") == [("finished", "a", "length", True)]


def test_samples_are_engine_requests_with_child_seeds() -> None:
    bench = Bench()
    bench.submit("a", "abc", SamplingParams(n=3, seed=11, max_tokens=5))
    adds = [m for m in bench.to_engine if isinstance(m, AddRequest)]
    assert [m.request_id for m in adds] == ["a.0", "a.1", "a.2"]
    assert [m.seed for m in adds] == [child_seed(11, i) for i in range(3)]
    bench.run()
    for add in adds:
        assert bench.token_ids("a", int(add.request_id[-1])) == [token_at(add, i) for i in range(5)]
    assert [output.is_last for output in bench.outputs["a"] if output.finish_reason] == [False, False, True]
    assert [record.request_id for record in bench.front.records.values()] == ["a.0", "a.1", "a.2"]


def test_the_first_sample_equals_the_only_one() -> None:
    bench = Bench()
    bench.submit("one", "abc", SamplingParams(n=1, seed=5, max_tokens=6))
    bench.submit("two", "abc", SamplingParams(n=2, seed=5, max_tokens=6))
    bench.run()
    assert bench.token_ids("one") == bench.token_ids("two", 0) != bench.token_ids("two", 1)


def test_a_request_without_seed_gets_one() -> None:
    bench = Bench(seeds=iter((1, 2)).__next__)
    bench.submit("a", "abc", SamplingParams(seed=None))
    bench.submit("b", "abc", SamplingParams(seed=9))
    bench.submit("c", "abc", SamplingParams(seed=None))
    assert [m.seed for m in bench.to_engine if isinstance(m, AddRequest)] == [1, 9, 2]
    drawn = {FrontEnd(lambda m: None, TOKENIZER, VOCAB_SIZE)._seeds() for _ in range(3)}
    assert len(drawn) == 3, "front ends must not share random seeds"


def test_prompt_logprobs_are_computed_for_one_sample_only() -> None:
    bench = Bench()
    bench.submit("a", "abcd", SamplingParams(n=2, temperature=0.0, max_tokens=2, prompt_logprobs=1, logprobs=2))
    assert [m.params.prompt_logprobs for m in bench.to_engine if isinstance(m, AddRequest)] == [1, None]
    bench.run()
    carried = [output for output in bench.outputs["a"] if output.prompt_logprobs is not None]
    assert [output.index for output in carried] == [0]
    assert len(carried[0].prompt_logprobs or []) == len(TOKENIZER.encode("abcd"))
    assert all(len(o.logprobs or []) == len(o.token_ids) for o in bench.outputs["a"])


# ---- where a sequence ends ----


def test_a_stop_string_cuts_the_text_and_ends_the_engine_request() -> None:
    bench = Bench()
    bench.submit("a", "Hello there, world", SamplingParams(temperature=0.0, max_tokens=50, stop=("re, w",)))
    cancels: list[CancelRequest] = []
    while bench.front.requests:
        bench.step()
        cancels += [m for m in bench.to_engine if isinstance(m, CancelRequest)]
    assert bench.text("a") == "Hello the"
    assert (bench.end("a").finish_reason, bench.end("a").stop_reason) == ("stop", "re, w")
    assert cancels == [CancelRequest("a", "stop", "re, w")]
    assert bench.log.of("finished") == [], "the engine has not confirmed yet"
    bench.run()
    assert bench.log.of("finished") == [("finished", "a", "stop", True)]
    assert bench.front.records["a"].finish_reason == "stop"
    assert bench.engine.requests == {}


def test_outputs_after_a_stop_string_are_ignored() -> None:
    bench = Bench()
    bench.submit("a", "xyz!", SamplingParams(temperature=0.0, max_tokens=50, stop=("yz",)))
    while bench.front.requests:
        bench.step()
    before = list(bench.outputs["a"])
    late = bench.engine.step(bench.now)  # a step that was in flight when the front end found the string
    assert bench.give(*late) == []
    assert bench.outputs["a"] == before
    bench.run()


def test_stop_strings_may_be_shown() -> None:
    bench = Bench()
    params = SamplingParams(temperature=0.0, max_tokens=50, stop="yz", include_stop_str_in_output=True)
    bench.submit("a", "xyz!", params)
    bench.run()
    assert bench.text("a") == "xyz"


def test_an_end_token_gives_no_text_unless_asked_for() -> None:
    bench = Bench()
    ids = [*TOKENIZER.encode("ab"), 0, *TOKENIZER.encode("cd")]
    bench.submit("plain", ids, SamplingParams(temperature=0.0, skip_special_tokens=False))
    bench.submit(
        "shown", ids, SamplingParams(temperature=0.0, skip_special_tokens=False, include_stop_str_in_output=True)
    )
    bench.submit(
        "ignored", ids, SamplingParams(temperature=0.0, max_tokens=5, skip_special_tokens=False, ignore_eos=True)
    )
    stop_ids = SamplingParams(temperature=0.0, stop_token_ids=(TOKENIZER.encode("b")[0],))
    bench.submit("token", TOKENIZER.encode("a") + TOKENIZER.encode("b"), stop_ids)
    bench.run()
    assert bench.text("plain") == "ab"
    assert bench.text("shown") == "ab<|endoftext|>"
    assert bench.text("ignored") == "ab<|endoftext|>cd"
    assert bench.text("token") == "a"
    assert bench.end("token").stop_reason == TOKENIZER.encode("b")[0]
    assert bench.end("plain").stop_reason is None


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="abc é😀", min_size=1, max_size=12),
    st.lists(st.text(alphabet="abc é", min_size=1, max_size=3), max_size=3),
    st.integers(1, 20),
    st.integers(0, 6),
    st.integers(1, 3),
)
def test_text_is_the_whole_text_cut_at_the_first_stop(
    prompt: str, stop: list[str], max_tokens: int, min_tokens: int, num_samples: int
) -> None:
    """Whatever the borders of tokens: streamed text is what decoding everything at once and cutting gives."""
    bench = Bench()
    min_tokens = min(min_tokens, max_tokens)
    params = SamplingParams(
        n=num_samples, temperature=0.0, max_tokens=max_tokens, stop=tuple(stop), min_tokens=min_tokens
    )
    bench.submit("a", prompt, params)
    bench.run()
    ids = TOKENIZER.encode(prompt)
    generated = [ids[i % len(ids)] for i in range(max_tokens)]
    whole = TOKENIZER.decode(generated)
    floor = len(TOKENIZER.decode(generated[:min_tokens]).rstrip("\ufffd")) if min_tokens else 0
    ends = [(whole.find(s, max(0, floor - len(s) + 1)) + len(s), i, s) for i, s in enumerate(stop)]
    ends = [end for end in ends if whole.find(end[2], max(0, floor - len(end[2]) + 1)) >= 0]
    for index in range(num_samples):
        if ends:
            cut, _, found = min(ends)
            assert bench.text("a", index) == whole[: cut - len(found)]
            assert bench.end("a", index).stop_reason == found
        else:
            assert bench.text("a", index) == whole
            assert bench.end("a", index).finish_reason == "length"
    assert not bench.engine.requests


# ---- refusals ----


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ([], GREEDY, "prompt", "empty"),
        ([5] * 1024, GREEDY, "prompt", "1024 tokens, at most 1023 fit"),
        ([5] * 5000, GREEDY, "prompt", "5000 tokens"),
        ([5, 400], GREEDY, "prompt", "token id 400"),
        ([-1], GREEDY, "prompt", "token id -1"),
        ([5], SamplingParams(stop_token_ids=(400,)), "stop_token_ids", "400"),
        ([5], SamplingParams(allowed_token_ids=(1, 999)), "allowed_token_ids", "999"),
        ([5], SamplingParams(logit_bias={401: 1.0}), "logit_bias", "401"),
        ([5], SamplingParams(truncate_prompt_tokens=0), "truncate_prompt_tokens", "0"),
        ([5], SamplingParams(truncate_prompt_tokens=-2), "truncate_prompt_tokens", "-2"),
    ],
)
def test_what_cannot_run_is_refused(prompt: list[int], params: SamplingParams, param: str, words: str) -> None:
    bench = Bench()
    with pytest.raises(RequestError, match=words) as caught:
        bench.submit("a", prompt, params)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert bench.to_engine == []
    assert bench.front.num_in_flight == 0
    bench.submit("a", "abc")  # the id is still free


def test_min_tokens_beyond_the_room_is_refused() -> None:
    bench = Bench()
    with pytest.raises(ParamsError) as caught:
        bench.submit("a", [5] * 1000, SamplingParams(max_tokens=None, min_tokens=50))
    assert caught.value.param == "min_tokens"


def test_max_tokens_is_the_room_that_is_left() -> None:
    bench = Bench()
    bench.submit("all", [5] * 1000, SamplingParams(max_tokens=None))
    bench.submit("some", [5] * 1000, SamplingParams(max_tokens=10))
    bench.submit("clipped", [5] * 1000, SamplingParams(max_tokens=100))
    assert [m.params.max_tokens for m in bench.to_engine if isinstance(m, AddRequest)] == [24, 10, 24]


def test_prompts_are_truncated_from_the_left() -> None:
    bench = Bench()
    prompt = list(range(1, 300)) * 5
    bench.submit("k", prompt, SamplingParams(truncate_prompt_tokens=7))
    bench.submit("fit", prompt, SamplingParams(truncate_prompt_tokens=-1, max_tokens=24))
    sent = [m.token_ids for m in bench.to_engine if isinstance(m, AddRequest)]
    assert sent == [prompt[-7:], prompt[-1000:]]


def test_bad_words_become_token_ids() -> None:
    bench = Bench()
    bench.submit("a", "abc", SamplingParams(bad_words=("time",)))
    add = bench.to_engine[0]
    assert isinstance(add, AddRequest)
    assert set(add.params.bad_words_ids) == set(TOKENIZER.encode_bad_words(["time"])) != set()
    with pytest.raises(ParamsError):
        bench.submit("b", "abc", SamplingParams(bad_words=(" ",)))


def test_nothing_is_taken_before_ready_or_after_drain() -> None:
    sent: list[ToEngine] = []
    log = Log()
    front = FrontEnd(sent.append, TOKENIZER, VOCAB_SIZE, observers=(log,))
    with pytest.raises(RequestError, match="loading") as caught:
        front.submit("a", [5], GREEDY, 0.0)
    assert (caught.value.status, caught.value.code) == (503, "loading")
    front.handle(ScriptedEngine().ready(), 0.0)
    front.submit("a", [5], GREEDY, 0.0)
    front.drain(9.0)
    with pytest.raises(RequestError, match="shutting down"):
        front.submit("b", [5], GREEDY, 0.0)
    assert sent[-1] == Drain(9.0)
    assert log.of("rejected") == [("rejected", "loading"), ("rejected", "draining")]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    bench = Bench(ScriptedEngine(max_num_seqs=2), max_queued=3)
    bench.engine.holds = True
    for number in range(5):
        bench.front.check_open(1, bench.now)
        bench.submit(str(number), "abc")
    with pytest.raises(RequestError) as caught:
        bench.front.check_open(1, bench.now)
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    assert caught.value.retry_after_s >= 1
    bench.front.cancel("4", bench.now)
    bench.front.check_open(1, bench.now)
    bench.engine.holds = False
    bench.run()
    bench.front.check_open(5, bench.now)
    bench.submit("n", "abc", SamplingParams(n=2))
    bench.front.check_open(5, bench.now)  # nobody waits yet: overshooting is better than never running
    with pytest.raises(RequestError, match="6 sequences, at most 5") as caught:
        bench.front.check_open(6, bench.now)
    assert (caught.value.status, caught.value.code) == (400, "too_many_sequences")
    assert bench.log.of("rejected") == [("rejected", "queue_full")]


def test_the_queue_counts_from_what_really_runs() -> None:
    bench = Bench(ScriptedEngine(max_num_seqs=100), max_queued=1)
    for number in range(3):
        bench.submit(str(number), "abc")
    bench.step()
    report = bench.engine.report(bench.now)
    bench.give(msgspec.structs.replace(report, num_running=1, num_waiting=2))
    with pytest.raises(RequestError):
        bench.front.check_open(1, bench.now)


# ---- ids ----


def test_an_id_is_free_when_the_engine_has_forgotten_it() -> None:
    bench = Bench()
    bench.submit("a", "abc", SamplingParams(n=2))
    for taken in ("a", "a.0", "a.1"):
        with pytest.raises(RequestError, match="in use"):
            bench.submit(taken, "abc")
    bench.submit("a.2", "abc")
    with pytest.raises(RequestError, match="in use"):
        bench.submit("a", "abc", SamplingParams(n=3))
    bench.front.cancel("a", bench.now)
    assert not bench.front.is_free("a", 2), "the engine's last word on it is still to come"
    bench.step()
    assert bench.front.is_free("a", 2)
    bench.submit("a", "abc")
    bench.run()
    assert bench.end("a").finish_reason == "length"


# ---- cancels, failures, death ----


def test_a_cancelled_request_says_nothing_more() -> None:
    bench = Bench()
    bench.submit("a", "abc", SamplingParams(n=2, max_tokens=50))
    bench.submit("b", "abc")
    bench.step()
    bench.step()
    before = len(bench.outputs["a"])
    bench.front.cancel("a", bench.now)
    bench.front.cancel("a", bench.now)
    bench.front.cancel("unknown", bench.now)
    assert [m for m in bench.to_engine if isinstance(m, CancelRequest)] == [CancelRequest("a.0"), CancelRequest("a.1")]
    bench.run()
    assert len(bench.outputs["a"]) == before
    assert bench.end("b").finish_reason == "length"
    assert {e for e in bench.log.of("finished") if e[1] != "b"} == {
        ("finished", "a.0", "abort", True),
        ("finished", "a.1", "abort", True),
    }


def test_a_failed_sample_fails_its_request_and_no_other() -> None:
    bench = Bench()
    bench.submit("a", "abc", SamplingParams(n=3, max_tokens=50))
    bench.submit("b", "abc")
    bench.step()
    bench.engine.requests.pop("a.1")
    outputs = bench.give(Failed("a.1", 500, "the step broke"))
    assert len(outputs) == 1
    assert outputs[0].is_last
    error = outputs[0].error
    assert error is not None
    assert (error.status, str(error)) == (500, "the step broke")
    bench.run()
    assert bench.end("b").finish_reason == "length"
    assert bench.engine.requests == {}
    finished = {event[1:3] for event in bench.log.of("finished")}
    assert finished == {("a.0", "abort"), ("a.1", "error"), ("a.2", "abort"), ("b", "length")}


def test_an_answer_to_a_late_question_fails_nobody() -> None:
    bench = Bench()
    bench.submit("a", "abc")
    assert bench.give(Failed("a", 404, "no such request")) == []
    assert bench.engine.handle(Explain("nobody"), 0.0) == [Failed("nobody", 404, "no such request")]
    bench.run()
    assert bench.end("a").finish_reason == "length"


@pytest.mark.parametrize("message", [Fatal("out of memory"), Stopped()])
def test_the_end_of_the_engine_is_told_to_all(message: FromEngine) -> None:
    bench = Bench()
    for name in "abc":
        bench.submit(name, "abc", SamplingParams(n=2))
    bench.step()
    outputs = bench.give(message)
    assert sorted(output.request_id for output in outputs) == ["a", "b", "c"]
    assert all(o.is_last and o.error is not None and o.error.status == 503 for o in outputs)
    assert bench.front.requests == {}
    assert len(bench.log.of("finished")) == 6
    bench.front.cancel("a", bench.now)
    assert not any(isinstance(m, CancelRequest) for m in bench.to_engine)
    with pytest.raises(RequestError) as caught:
        bench.submit("d", "abc")
    assert caught.value.status == 503
    assert bench.front.engine_lost("again", bench.now) == []


def test_records_are_bounded() -> None:
    bench = Bench(ScriptedEngine(max_num_seqs=2000))
    for number in range(MAX_RECORDS + 50):
        bench.submit(str(number), "abc", SamplingParams(max_tokens=1))
    bench.run()
    assert len(bench.front.records) == MAX_RECORDS
    assert "0" not in bench.front.records
    assert str(MAX_RECORDS + 49) in bench.front.records


# ---- everything at once ----


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_nothing_leaks_whatever_happens(seed: int) -> None:
    """Random arrivals, stops, cancels and failures: every request ends once, and nothing is left on either side."""
    chance = random.Random(seed)
    bench = Bench(ScriptedEngine(max_num_seqs=3), max_queued=6)
    submitted: list[str] = []
    cancelled: set[str] = set()
    for number in range(60):
        action = chance.random()
        if action < 0.5:
            name = f"r{number}"
            params = SamplingParams(
                n=chance.choice((1, 1, 3)), temperature=chance.choice((0.0, 1.0)), max_tokens=chance.randint(1, 9),
                stop=chance.choice(((), ("b",), ("cc", "a"))),
            )  # fmt: skip
            try:
                bench.front.check_open(params.n, bench.now)
                bench.submit(name, chance.choice(("abc", "ccba", "é😀")), params)
                submitted.append(name)
            except RequestError as error:
                assert error.status == 429
        elif action < 0.6 and bench.front.requests:
            name = chance.choice(list(bench.front.requests))
            bench.front.cancel(name, bench.now)
            cancelled.add(name)
        elif action < 0.65:
            bench.engine.fail_next = (400, "refused")
        else:
            bench.step()
    bench.engine.fail_next = None
    bench.run()
    for name in submitted:
        last = [output for output in bench.outputs[name] if output.is_last]
        assert len(last) == (0 if name in cancelled and not last else 1)
        assert last or name in cancelled
    assert bench.front.num_in_flight == 0
    assert bench.front._ending == {}
    assert bench.engine.requests == {}
    received = [event[1] for event in bench.log.of("received")]
    assert sorted(received) == sorted(event[1] for event in bench.log.of("finished"))
