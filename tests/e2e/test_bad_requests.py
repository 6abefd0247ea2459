"""What clients must not send, to a real server: each gets its status and OpenAI's error, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.e2e.serving import MAX_MODEL_LEN, RealServer, assert_error, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER: list[Any] = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
VOCABULARY = 8192


def deep(levels: int) -> bytes:
    return b'{"messages": ' + b"[" * levels + b"]" * levels + b"}"


BODIES: dict[str, tuple[str, bytes, str]] = {
    "no JSON": (CHAT, b"hello", "JSON"),
    "cut JSON": (CHAT, b'{"messages": [{"role": "us', "JSON"),
    "two documents": (TEXT, b'{"prompt": "a"}{"prompt": "b"}', "JSON"),
    "not a number": (TEXT, b'{"prompt": "a", "temperature": NaN}', "JSON"),
    "infinity": (TEXT, b'{"prompt": "a", "temperature": 1e999}', ""),
    "empty": (CHAT, b"", "empty"),
    "a list": (CHAT, b"[]", "object"),
    "a string": (TEXT, b'"prompt"', "object"),
    "invalid UTF-8": (TEXT, b'{"prompt": "\xff\xfe"}', "UTF-8"),
    "half a surrogate": (TEXT, b'{"prompt": "\\ud800"}', ""),
    "deep arrays": (CHAT, deep(100_000), "64 levels"),
    "deep objects": (TEXT, b'{"a":' * 5000 + b"1" + b"}" * 5000, "64 levels"),
    "a million brackets": (TEXT, b'{"prompt": [' + b"[]," * 1_000_001 + b"[]]}", "1000000"),
    "a binary body": (TEXT, bytes(range(256)) * 64, ""),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(running: RealServer, name: str) -> None:
    path, body, words = BODIES[name]
    message = assert_error(running.http.post(path, content=body), 400)
    assert words in message


FIELDS: list[tuple[str, dict[str, Any], str | None, str]] = [
    # wrong types
    (CHAT, {"messages": "Hi"}, "messages", "array"),
    (CHAT, {"messages": None}, "messages", ""),
    (CHAT, {}, "messages", "required"),
    (TEXT, {}, "prompt", "required"),
    (CHAT, {"messages": USER, "temperature": "hot"}, "temperature", "float"),
    (CHAT, {"messages": USER, "max_tokens": 1.5}, "max_tokens", "int"),
    (CHAT, {"messages": USER, "max_tokens": 10**12}, "max_tokens", ""),
    (CHAT, {"messages": USER, "n": True}, "n", "int"),
    (CHAT, {"messages": USER, "stream": "yes"}, "stream", "bool"),
    (CHAT, {"messages": USER, "stop": 7}, "stop", ""),
    (CHAT, {"messages": USER, "stop": [7]}, "stop[0]", ""),
    (TEXT, {"prompt": {"a": 1}}, "prompt", ""),
    (TEXT, {"prompt": 7}, "prompt", ""),
    (TEXT, {"prompt": [1.5]}, "prompt[0]", ""),
    (TEXT, {"prompt": [True, False]}, "prompt[0]", ""),
    (TEXT, {"prompt": ["a", 7]}, "prompt[1]", ""),
    (TEXT, {"prompt": "a", "logit_bias": [1]}, "logit_bias", ""),
    (TEXT, {"prompt": "a", "logit_bias": {"dog": 1}}, "logit_bias", "dog"),
    (TEXT, {"prompt": "a", "seed": 1.5}, "seed", "int"),
    # out of range
    (CHAT, {"messages": USER, "temperature": -0.1}, "temperature", "between 0 and"),
    (CHAT, {"messages": USER, "top_p": 0}, "top_p", "above 0"),
    (CHAT, {"messages": USER, "top_p": 1.1}, "top_p", ""),
    (CHAT, {"messages": USER, "top_k": -2}, "top_k", ""),
    (CHAT, {"messages": USER, "min_p": 2}, "min_p", ""),
    (CHAT, {"messages": USER, "n": 0}, "n", ""),
    (CHAT, {"messages": USER, "n": 100_000}, "n", "128"),
    (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens", "at least 1"),
    (CHAT, {"messages": USER, "max_completion_tokens": -5}, "max_completion_tokens", ""),
    (CHAT, {"messages": USER, "presence_penalty": 3}, "presence_penalty", ""),
    (CHAT, {"messages": USER, "frequency_penalty": -3}, "frequency_penalty", ""),
    (CHAT, {"messages": USER, "repetition_penalty": 0}, "repetition_penalty", ""),
    (CHAT, {"messages": USER, "min_tokens": 9, "max_tokens": 3}, "min_tokens", ""),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs", "logprobs"),
    (CHAT, {"messages": USER, "stop": ["a"] * 17}, "stop", "16"),
    (CHAT, {"messages": USER, "stop": [""]}, "stop", "empty"),
    (TEXT, {"prompt": "a", "logprobs": 30}, "logprobs", "20"),
    (TEXT, {"prompt": "a", "seed": 2**80}, "seed", "64 bits"),
    (TEXT, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "100"),
    (TEXT, {"prompt": "a", "logit_bias": {str(VOCABULARY): 1}}, "logit_bias", str(VOCABULARY)),
    (TEXT, {"prompt": "a", "stop_token_ids": [VOCABULARY]}, "stop_token_ids", str(VOCABULARY)),
    (TEXT, {"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids", "empty"),
    (TEXT, {"prompt": "a", "allowed_token_ids": [-1]}, "allowed_token_ids", "-1"),
    (TEXT, {"prompt": "a", "bad_words": [" "]}, "bad_words", ""),
    (TEXT, {"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ""),
    (TEXT, {"prompt": "a", "request_id": "a b"}, "request_id", ""),
    (TEXT, {"prompt": "a", "best_of": 3}, "best_of", ""),
    # prompts
    (TEXT, {"prompt": ""}, "prompt", "empty"),
    (TEXT, {"prompt": []}, "prompt", "empty"),
    (TEXT, {"prompt": [[]]}, "prompt", "empty"),
    (TEXT, {"prompt": ["a", ""]}, "prompt", "prompt[1]"),
    (TEXT, {"prompt": [VOCABULARY]}, "prompt", str(VOCABULARY)),
    (TEXT, {"prompt": [-1]}, "prompt", ""),
    (TEXT, {"prompt": [[1, 2], [3, 2**40]]}, "prompt[1]", ""),
    (TEXT, {"prompt": ["a"] * 513}, "prompt", "512"),
    (CHAT, {"messages": []}, "messages", "at least one"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role", ""),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content", ""),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, ""),
    (CHAT, {"messages": ["Hi"]}, None, "object"),
    # what this version does not do
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (CHAT, {"messages": USER, "guided_regex": "a+"}, "guided_regex", "not supported"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice", "not supported"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    (TEXT, {"prompt": "a", "use_beam_search": True}, "use_beam_search", "not supported"),
    (TEXT, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), FIELDS, ids=lambda value: str(value)[:60])
def test_fields_that_cannot_be(
    running: RealServer, path: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    assert words in assert_error(running.post(path, body), 400, param)


def test_a_prompt_that_is_too_long_is_told_with_both_lengths(server: RealServer) -> None:
    for num_tokens in (MAX_MODEL_LEN, 3 * MAX_MODEL_LEN):
        response = server.post(TEXT, {"prompt": [7] * num_tokens})
        message = assert_error(response, 400, "prompt", "context_length_exceeded")
        assert str(num_tokens) in message and str(MAX_MODEL_LEN) in message
    words = "word " * 5 * MAX_MODEL_LEN
    num_tokens = server.post("/tokenize", {"prompt": words}).json()["count"]
    message = assert_error(server.post(TEXT, {"prompt": words}), 400, "prompt", "context_length_exceeded")
    assert str(num_tokens) in message
    message = assert_error(server.post(CHAT, {"messages": [{"role": "user", "content": words}]}), 400)
    assert str(MAX_MODEL_LEN) in message
    cut = server.complete([7] * 600, truncate_prompt_tokens=20, max_tokens=1)
    assert cut["usage"]["prompt_tokens"] == 20


def test_unknown_models_and_paths(server: RealServer) -> None:
    for path, body in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        assert "gpt-4" in assert_error(server.post(path, {**body, "model": "gpt-4"}), 404, "model", "model_not_found")
    assert_error(server.http.get("/v1/models/gpt-4"), 404, code="model_not_found")
    assert_error(server.post("/v1/embeddings", {"input": "a"}), 404, code="not_found")
    assert_error(server.http.get(CHAT), 405, code="method_not_allowed")


def test_ids_that_are_no_tokens_cannot_be_text(server: RealServer) -> None:
    for tokens in ([VOCABULARY], [-1], ["a"], "a", [2**40]):
        assert_error(server.post("/detokenize", {"tokens": tokens}), 400)
    assert_error(server.post("/tokenize", {}), 400, "prompt")
    assert_error(server.post("/tokenize", {"prompt": "a", "messages": USER}), 400, "prompt")


def test_a_template_of_a_request_needs_the_servers_consent(server: RealServer) -> None:
    body = {"messages": USER, "chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}"}
    assert_error(server.post(CHAT, body), 400, "chat_template")


def test_a_body_of_100_megabytes_is_refused(server: RealServer) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 1_000_000

    begin = time.monotonic()
    declared = {"content-length": str(100_000_000), "content-type": "application/json"}
    with contextlib.suppress(httpx.WriteError):  # it closes the connection while we still send
        assert_error(server.http.post(TEXT, content=pieces()), 413, code="body_too_large")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        head = "".join(f"{name}: {value}\r\n" for name, value in declared.items())
        sock.sendall(f"POST {TEXT} HTTP/1.1\r\nhost: a\r\n{head}\r\n".encode())
        answer = ""
        while "body_too_large" not in answer and (piece := sock.recv(4096)):  # head and body may come apart
            answer += piece.decode()
    assert answer.startswith("HTTP/1.1 413 ") and "body_too_large" in answer  # before a byte of it was sent
    assert time.monotonic() - begin < 30


def test_broken_http_is_answered_and_forgotten(server: RealServer) -> None:
    length = b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n"
    for sent in (b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", length):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
            sock.sendall(sent)
            assert sock.recv(4096).startswith((b"HTTP/1.1 400", b"HTTP/1.1 505", b"HTTP/1.1 404", b"HTTP/1.1 200"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\n{")  # and it goes away


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = ("temperature", "top_p", "top_k", "n", "stop", "seed", "logit_bias", "stream_options", "tools", "documents",
         "chat_template_kwargs", "allowed_token_ids", "bad_words", "prompt_logprobs", "priority", "cache_salt", "user",
         "messages", "prompt", "vllm_xargs", "response_format", "min_tokens", "echo", "logprobs")  # fmt: skip


def test_whatever_comes_is_an_answer(server: RealServer) -> None:
    """Any JSON in any field: 200 or a 4xx in OpenAI's shape, never a 5xx, never silence."""

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(path=st.sampled_from([CHAT, TEXT]), fields=st.dictionaries(st.sampled_from(NAMES), json_values, max_size=3))
    def check(path: str, fields: dict[str, Any]) -> None:
        body = {"messages": USER, "prompt": "Hi", **fields, "max_tokens": 1}
        response = server.post(path, body)
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, response.text
            assert_error(response, response.status_code)

    check()


def test_bad_requests_harm_no_good_one(server: RealServer) -> None:
    """While all of the above comes from several clients at once, good requests get the answers that they get alone."""
    expected = server.complete(**GOOD)["choices"][0]["text"]
    bad = [(path, body, {}) for path, body, _, _ in FIELDS] + [(path, raw, {}) for path, raw, _ in BODIES.values()]
    statuses: list[int] = []
    texts: list[str] = []

    def send(seed: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for i, (path, body, _) in enumerate(random.Random(seed).sample(bad, 24)):
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                statuses.append(http.post(path, content=content).status_code)
                if i % 12 == seed % 12:
                    texts.append(http.post(TEXT, json=GOOD).json()["choices"][0]["text"])

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(statuses) == {400} and len(statuses) == 96
    assert texts == [expected] * 8
    until(lambda: server.http.get("/load").json()["server_load"] == 0, what="an empty server")
    server.until_idle()
    assert "Traceback" not in server.errors()
