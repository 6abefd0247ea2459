"""The request parser: what is accepted, what is refused and in which words, and that nothing else ever happens."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.request import SamplingParams
from penstock.server.errors import ApiError
from penstock.server.requests import (
    MAX_DEPTH,
    parse_object,
    read_prompts,
    read_request,
    refuse_unsupported,
    sampling_params,
    valid_request_id,
    warn_unknown,
)
from penstock.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return read_request(json.dumps({"messages": MESSAGES, **fields}).encode(), ChatRequest)[0]


def completion(**fields: Any) -> CompletionRequest:
    return read_request(json.dumps({"prompt": "hi", **fields}).encode(), CompletionRequest)[0]


def refusal(body: bytes | dict[str, Any], kind: Any = ChatRequest) -> ApiError:
    """The error that a body gets, wherever it is found."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        request, _ = read_request(encoded, kind)
        refuse_unsupported(request)
        sampling_params(request, {})
    return caught.value


# ---- JSON ----


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"messages": [}', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b"[" * 100_000, "deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "deeper than 64"),
        (b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}", "deeper than 64"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, words: str) -> None:
    error = refusal(body)
    assert error.status == 400
    assert words in error.message


def test_too_many_containers_are_refused_before_they_are_built() -> None:
    begin = time.perf_counter()
    assert "more than 1000000 arrays" in refusal(b'{"a": [' + b"[]," * 8_000_000 + b"1]}").message
    assert time.perf_counter() - begin < 1.0


def test_brackets_in_strings_are_no_nesting() -> None:
    text = '[{"\\' * 500
    assert parse_object(json.dumps({"a": text, "b": [[1]] * 100}).encode()) == {"a": text, "b": [[1]] * 100}


@given(st.integers(0, 2 * MAX_DEPTH), st.integers(0, 100))
def test_depth_is_counted_exactly(depth: int, num_beside: int) -> None:
    """Nesting to MAX_DEPTH passes and one more does not, however many brackets stand side by side."""
    beside = ", []" * num_beside
    body = b'{"a": [' + b"[" * depth + b"]" * depth + beside.encode() + b"]}"
    if depth + 2 > MAX_DEPTH:
        with pytest.raises(ApiError, match="deeper"):
            parse_object(body)
    elif depth or not num_beside:
        parse_object(body)


@pytest.mark.parametrize("piece", [b'"\\', b'"', b'\\"', b'[""', b'{"a":"\\"', b"]", b'"\\\\'])
def test_the_depth_check_is_linear(piece: bytes) -> None:
    """Malformed input must not make the bracket search start over at every quote."""
    body = b"[" * 65 + piece * (400_000 // len(piece))
    begin = time.perf_counter()
    with pytest.raises(ApiError):
        parse_object(body)
    assert time.perf_counter() - begin < 2.0


# ---- types and fields ----


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": 3}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": "x"}, "stream": True}, "stream_options.include_usage"),
        ({"logit_bias": {"5": "x"}}, "logit_bias[...]"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"tools": {}}, "tools"),
        ({"seed": 2**64}, "seed"),
        ({"vllm_xargs": {"a": {"b": 1}}}, "vllm_xargs[...]"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt_logprobs": 50}, "prompt_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": ["text"]}}, "response_format"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"bad_words": ["a"] * 1001}, "bad_words"),
        ({"stop": "x" * 5000}, "stop"),
        ({"messages": MESSAGES * 17_000}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({"messages": MESSAGES, **fields})
    assert (error.status, error.param) == (400, param)
    assert param.split("[")[0].split(".")[0] in error.message


def test_a_missing_field_is_named() -> None:
    assert refusal({}).param == "messages"
    assert refusal({"model": "m"}, CompletionRequest).param == "prompt"
    error = refusal({"prompt": "x", "suffix": "y"}, CompletionRequest)
    assert (error.param, error.code) == ("suffix", "not_supported")


def test_what_clients_send_is_accepted() -> None:
    """Fields of OpenAI's and vLLM's clients that change nothing, defaults written out, integers as floats."""
    request, unknown = read_request(
        json.dumps(
            {
                "messages": MESSAGES, "model": None, "user": "me", "metadata": {"a": 1}, "store": False, "stop": None,
                "service_tier": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"}, "n": 1.0,
                "tool_choice": "none", "tools": [], "modalities": ["text"], "max_tokens": 16.0, "temperature": 1,
                "logprobs": False, "logit_bias": {}, "safety_identifier": "x", "stream_options": None, "seed": -1,
                "frequency_penalty": None, "vllm_xargs": {"a": 1, "b": "c", "d": 0.5}, "use_beam_search": False,
                "best_of": 1,
            }
        ).encode(),
        ChatRequest,
    )  # fmt: skip
    assert unknown == []
    refuse_unsupported(request)
    params = sampling_params(request, {})
    assert (params.n, params.max_tokens, params.stop, params.extra_args) == (1, 16, (), {"a": 1, "b": "c", "d": 0.5})


def test_unknown_fields_are_named_and_harmless() -> None:
    body = {"messages": MESSAGES, "wizardry": 1, "wärme": {"a": [1]}, "x\r\ny": 2}
    _, unknown = read_request(json.dumps(body).encode(), ChatRequest)
    assert unknown == ["wizardry", "wärme", "x\r\ny"]
    warning = warn_unknown(unknown)
    assert warning == "ignored fields: wizardry, w?rme, x?y"
    assert warn_unknown([]) is None
    assert len(warn_unknown(["f" * 5000] * 500) or "") < 1300, "a header must stay small"


# ---- sampling parameters ----


def test_defaults_are_those_of_the_api() -> None:
    assert sampling_params(chat(), {}) == SamplingParams(max_tokens=None)
    assert sampling_params(completion(), {}) == SamplingParams(max_tokens=16)


def test_the_checkpoints_defaults_give_way_to_the_request() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 99, "repetition_penalty": 1.1}
    silent = sampling_params(chat(), defaults)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.max_tokens) == (0.6, 0.9, 20, 99)
    assert silent.repetition_penalty == 1.1
    loud = sampling_params(chat(temperature=0, top_p=1, top_k=0, max_tokens=5, repetition_penalty=1), defaults)
    assert (loud.temperature, loud.top_p, loud.top_k, loud.max_tokens, loud.repetition_penalty) == (0, 1, 0, 5, 1)


def test_logprobs_mean_what_the_endpoint_says() -> None:
    assert sampling_params(chat(), {}).logprobs is None
    assert sampling_params(chat(logprobs=True), {}).logprobs == 0
    assert sampling_params(chat(logprobs=True, top_logprobs=4), {}).logprobs == 4
    assert sampling_params(completion(logprobs=0), {}).logprobs == 0
    echo = sampling_params(completion(logprobs=2, echo=True, max_tokens=0), {})
    assert (echo.logprobs, echo.prompt_logprobs, echo.max_tokens) == (2, 2, 1)
    assert sampling_params(chat(max_tokens=4, max_completion_tokens=7), {}).max_tokens == 7


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("hi", ["hi"]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[1], "a", []], [[1], "a", []]),
    ],
)
def test_prompts_have_four_forms(prompt: Any, read: list[Any]) -> None:
    assert read_prompts(prompt) == read


@pytest.mark.parametrize(
    "prompt", [None, 3, {}, [], [1, "a"], [1.5], [True], [None], [["a"]], [[1], [-1]], [2**31], ["a"] * 513, [[[1]]]]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        read_prompts(prompt)
    assert (caught.value.status, str(caught.value.param)[:6]) == (400, "prompt")


def test_request_ids_are_safe_in_headers_and_paths() -> None:
    assert all(valid_request_id(text) for text in ("a", "chatcmpl-1.2:3_x", "0" * 128))
    assert not any(valid_request_id(text) for text in ("", "a b", "a\n", "é", "0" * 129, "../x", "a/b", ".a"))


# ---- fuzz: ApiError or a request, never anything else ----

KINDS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
NAMES = sorted({name for kind in KINDS for name in kind.__struct_fields__})
NAME = st.sampled_from(NAMES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["text", "user"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | NAME, inner, max_size=4),
    max_leaves=5,
)
BODIES = st.dictionaries(NAME | st.text(max_size=5), JSON, max_size=6)


def survive(body: bytes) -> None:
    for kind in KINDS:
        try:
            request, unknown = read_request(body, kind)
            warning = warn_unknown(unknown)
            assert warning is None or warning.isascii()
            if isinstance(request, ChatRequest | CompletionRequest):
                refuse_unsupported(request)
                sampling_params(request, {"temperature": 0.5})
                if isinstance(request, CompletionRequest):
                    read_prompts(request.prompt)
        except ApiError as error:
            assert error.status == 400
            assert json.loads(error.response().body)["error"]["message"]


@settings(max_examples=150, deadline=None)
@given(BODIES)
def test_any_object_is_read_or_refused(body: dict[str, Any]) -> None:
    survive(json.dumps({"messages": MESSAGES, "prompt": "x", "tokens": [], **body}, ensure_ascii=True).encode())


@settings(max_examples=150, deadline=None)
@given(BODIES, st.data())
def test_any_mutilated_object_is_read_or_refused(body: dict[str, Any], data: st.DataObject) -> None:
    encoded = bytearray(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, max(0, len(encoded) - 1)))
        encoded[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    survive(bytes(encoded))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    survive(body)
