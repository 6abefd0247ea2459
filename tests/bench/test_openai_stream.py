"""Requests as JSON, and streams of events read from bytes that are cut anywhere."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bench.datasets import BenchRequest, Vocabulary
from penstock.bench.openai_stream import StreamReader, body_of


def sse(*events: object) -> bytes:
    return b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events)


def piece(text: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"id": "x", "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}}
STREAM = sse(piece("Once"), piece(" upon"), piece("é \n\n data: "), piece("", "length"), USAGE, b"[DONE]")


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12), windows=st.booleans())
def test_any_cutting_gives_the_same_outcome(cuts: list[int], windows: bool) -> None:
    stream = STREAM.replace(b"\n", b"\r\n") if windows else STREAM
    reader = StreamReader(3)
    edges = [0, *sorted(cuts), len(stream)]
    for n, (begin, end) in enumerate(pairwise(edges)):
        reader.feed(stream[begin:end], float(n))
    outcome = reader.finish()
    assert outcome.error == ""
    assert outcome.text == "Once uponé \n\n data: "
    assert (outcome.num_prompt, outcome.num_output) == (11, 5)  # the server's counts
    assert len(outcome.token_times_s) == 3  # events with text
    assert outcome.token_times_s == sorted(outcome.token_times_s)
    assert reader.is_done
    assert reader.finish_reason == "length"


def test_times_and_gaps() -> None:
    reader = StreamReader(3)
    for now_s, event in ((10.0, piece("a")), (10.5, piece("b")), (11.5, piece("c")), (11.6, piece("", "stop"))):
        reader.feed(sse(event), now_s)
    outcome = reader.finish()
    outcome.start_s = 9.0
    assert outcome.ttft_s == 1.0
    assert outcome.itls_s == [0.5, 1.0]
    assert outcome.latency_s == 11.6 - 9.0
    assert (outcome.num_prompt, outcome.num_output) == (3, 3)  # no usage: what was known, and events


def test_chat_deltas() -> None:
    reader = StreamReader(1)
    for now_s, delta in (
        (1.0, {"role": "assistant", "content": ""}),
        (2.0, {"reasoning": "hm"}),
        (3.0, {"content": "hi"}),
    ):
        reader.feed(sse({"choices": [{"delta": delta}]}), now_s)
    reader.feed(b": keep-alive\n\n" + sse({"choices": [{"delta": {}, "finish_reason": "stop"}]}, b"[DONE]"), 4.0)
    outcome = reader.finish()
    assert outcome.text == "hmhi"
    assert outcome.token_times_s == [2.0, 3.0]  # the empty role chunk is no token
    assert outcome.error == ""


def test_an_answer_without_text_has_one_time() -> None:
    reader = StreamReader(1)
    reader.feed(sse(piece("", "stop"), {"choices": None, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}), 2.0)
    outcome = reader.finish()
    assert outcome.error == ""
    assert outcome.token_times_s == [2.0]


def test_what_goes_wrong_is_told() -> None:
    for stream, said in (
        (sse(piece("a")), "before its answer did"),
        (b"", "without a choice"),
        (sse(piece("a"), {"error": {"message": "the engine died", "code": 500}}, b"[DONE]"), "the engine died"),
        (sse(b"{nonsense"), "not JSON"),
    ):
        reader = StreamReader(1)
        reader.feed(stream, 1.0)
        assert said in reader.finish().error


def test_bodies() -> None:
    vocabulary = Vocabulary.of_words()
    request = BenchRequest(num_output=9, num_prompt=2, token_ids=[4, 5])
    body = json.loads(body_of(request, "m", vocabulary, chat=False, ignore_eos=True, extra={"top_k": 3}))
    assert body == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "prompt": [4, 5], "max_tokens": 9,
        "ignore_eos": True, "top_k": 3,
    }  # fmt: skip
    chat = json.loads(body_of(request, "m", vocabulary, chat=True))
    assert chat["messages"] == [{"role": "user", "content": vocabulary.text_of([4, 5])}]
    assert chat["max_completion_tokens"] == 9
    assert "ignore_eos" not in chat
    told = json.loads(body_of(BenchRequest(1, 0, text="hi"), "m", None, chat=False, extra={"max_tokens": 2}))
    assert told["prompt"] == "hi"
    assert told["max_tokens"] == 2  # the user's word counts
