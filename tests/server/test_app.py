"""Everything around the completions: errors in OpenAI's shape, keys, limits, CORS, disconnects, the small endpoints."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.harness import RunningServer, assert_error
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_requests import BODIES
from tests.server.tiny_model import MODEL, tiny_tokenizer

from penstock import __version__
from penstock.config.schema import ServerOptions
from penstock.engine.messages import CancelRequest, ResetPrefixCache
from penstock.server import state as state_module
from penstock.server.answers import KEEP_ALIVE

TOKENIZER = tiny_tokenizer()
PROMPT = {"prompt": "Once", "max_tokens": 3, "temperature": 0}
FOREVER = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "hi"}]
POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    options = ServerOptions(max_body_bytes=1 << 20, max_num_queued_reqs=4)
    with RunningServer(options, ScriptedEngine(max_num_seqs=4)) as running:
        yield running


@pytest.fixture(autouse=True)
def _engine_at_rest(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves work behind."""
    yield
    if "server" in request.fixturenames:
        running: RunningServer = request.getfixturevalue("server")
        running.engine.holds = False
        running.until(lambda: not running.engine.requests)
        running.until(lambda: running.http.get("/load").json() == {"server_load": 0})


def raw_post(server: RunningServer, path: str, body: bytes, headers: str = "") -> socket.socket:
    """A connection over which a request was sent by hand."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n"
    connection.sendall(head.encode() + body)
    return connection


# ---- errors ----


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/models/", 404, None),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/%ff%fe", 404, "not_found"),
    ],
)
def test_wrong_paths_and_methods(server: RunningServer, method: str, path: str, status: int, code: str | None) -> None:
    response = server.http.request(method, path)
    assert_error(response, status, code=code)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"a": ' + b"[" * 3000, b'{"messages": 5, "prompt": 5}'])
def test_bad_bodies_are_400(server: RunningServer, path: str, body: bytes) -> None:
    assert_error(server.http.post(path, content=body), 400)


@pytest.mark.parametrize("path", POSTS)
def test_unknown_models_are_404(server: RunningServer, path: str) -> None:
    body = {"model": "gpt-17", "messages": MESSAGES, "prompt": "x", "tokens": [1]}
    if path == "/tokenize":
        del body["messages"]
    message = assert_error(server.http.post(path, json=body), 404, param="model", code="model_not_found")
    assert "gpt-17" in message
    assert server.http.post(path, json={**body, "model": "alias", "max_tokens": 1}).status_code == 200
    with server.client() as client, pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-17", prompt="x")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [5] * 2000}, "prompt", "2000 tokens, at most 1023"),
        ({"prompt": "x y " * 1000}, "prompt", "tokens, at most 1023"),
        ({"prompt": [400]}, "prompt", "400"),
        ({"prompt": "x", "logit_bias": {"400": 1}}, "logit_bias", "400"),
        ({"prompt": "x", "allowed_token_ids": [1] * 401}, "allowed_token_ids", "401"),
        ({"prompt": "x", "bad_words": [""]}, "bad_words", "bad_words"),
        ({"prompt": "x" * 2_000_000}, None, "larger"),
    ],
)
def test_what_does_not_fit_the_model(server: RunningServer, fields: dict[str, Any], param: str, words: str) -> None:
    response = server.http.post("/v1/completions", json=fields)
    assert words in assert_error(response, 413 if param is None else 400, param=param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": MESSAGES, "chat_template": "{% for %}"}, "chat_template"),
        ({"messages": MESSAGES, "chat_template": "{{ ''.__class__ }}"}, "chat_template"),
        ({"messages": [{"role": "user", "content": "x y " * 1000}]}, "prompt"),
    ],
)
def test_conversations_that_cannot_be_rendered(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    assert_error(server.http.post("/v1/chat/completions", json=fields), 400, param=param)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, path=st.sampled_from(POSTS))
def test_no_body_makes_the_server_fail(server: RunningServer, body: dict[str, Any], path: str) -> None:
    """Whatever JSON comes: an answer, or an error in OpenAI's shape that is the client's fault."""
    asked = {"messages": MESSAGES, "prompt": "x", "tokens": [], **body, "max_tokens": 2, "n": 1, "best_of": None}
    response = server.http.post(path, content=json.dumps(asked).encode(), headers={"content-type": "application/json"})
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        assert_error(response, response.status_code)


def test_a_mistake_of_ours_is_a_500_and_stays_alone(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(server.state, "render", broken)
        response = server.http.post(
            "/v1/chat/completions", json={"messages": MESSAGES}, headers={"x-request-id": "oops"}
        )
        message = assert_error(response, 500, code="internal_error")
    assert "oops" in message
    assert "secret" not in message
    assert server.http.post("/v1/completions", json=PROMPT).status_code == 200


# ---- keys, CORS ----


def test_keys_guard_all_but_what_must_be_open() -> None:
    with RunningServer(ServerOptions(api_key=("first", "zweiter-schlüssel"))) as server:
        for path in ("/v1/models", "/load", "/live/snapshot", "/explain/x", "/nothing"):
            assert_error(server.http.get(path), 401, code="invalid_api_key")
        for path in ("/v1/completions", "/tokenize", "/reset_prefix_cache"):
            assert_error(server.http.post(path, json=PROMPT), 401)
        for path in ("/health", "/ping", "/version", "/metrics"):
            assert server.http.get(path).status_code == 200
        for key in ("first", "zweiter-schlüssel"):
            for header in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}, {"x-api-key": key}):
                encoded = {name: value.encode() for name, value in header.items()}
                assert server.http.get("/v1/models", headers=encoded).status_code == 200
        for header in ({"authorization": "Bearer firs"}, {"authorization": "Basic first"}, {"x-api-key": "first "[:4]}):
            assert_error(server.http.get("/v1/models", headers=header), 401)
        response = server.http.get("/v1/models", headers={"origin": "http://elsewhere"})
        assert response.headers["access-control-allow-origin"] == "*", "a page must be able to read the refusal"
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        server.client().with_options(api_key="first").models.list()


def test_cors() -> None:
    with RunningServer(ServerOptions(allowed_origins=("http://good",), allow_credentials=True)) as server:
        ask = {
            "origin": "http://good",
            "access-control-request-method": "POST",
            "access-control-request-headers": "x-api-key",
        }
        allowed = server.http.options("/v1/completions", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "http://good"
        assert server.http.options("/v1/completions", headers={**ask, "origin": "http://bad"}).status_code == 400
        answer = server.http.post("/v1/completions", json=PROMPT, headers={"origin": "http://good"})
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        bad = server.http.post("/v1/completions", json={**PROMPT, "stream": True}, headers={"origin": "http://bad"})
        assert "access-control-allow-origin" not in bad.headers


# ---- bodies ----


def test_a_declared_large_body_is_refused_before_it_is_sent(server: RunningServer) -> None:
    with closing(raw_post(server, "/v1/completions", b"{", "content-length: 100000000\r\n")) as connection:
        answer = connection.recv(65536)
        while b"}}" not in answer:
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in answer


def test_a_large_body_is_refused_while_it_comes_in(server: RunningServer) -> None:
    """100 MB in pieces of unknown number: the answer comes after the first megabyte, and the client can read it."""
    num_sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b" " * 1_000_000

    before = resident_bytes()
    assert_error(server.http.post("/v1/completions", content=pieces()), 413, code="body_too_large")
    assert resident_bytes() - before < 30_000_000
    whole = server.http.post("/v1/completions", content=b'{"prompt": "' + b"x" * 30_000_000 + b'"}')
    assert_error(whole, 413)
    assert server.http.post("/v1/completions", json=PROMPT).status_code == 200


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_a_body_that_never_comes_is_given_up(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.server.limits.BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr("penstock.server.limits.LINGER_S", 0.2)
    with closing(raw_post(server, "/v1/completions", b"{", "content-length: 100\r\n")) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


# ---- queue ----


def test_a_full_queue_is_429_with_retry_after(server: RunningServer) -> None:
    server.engine.holds = True
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/completions", json=PROMPT, timeout=30).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    server.until(lambda: len(server.engine.requests) == 8)
    refused = server.http.post("/v1/completions", json=PROMPT)
    assert_error(refused, 429, code="queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert server.http.get("/load").json() == {"server_load": 8}
    rejections = [
        line for line in server.http.get("/metrics").text.splitlines() if "admission_rejections_total{" in line
    ]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in rejections) == 1
    server.engine.holds = False
    for thread in threads:
        thread.join(20)
    assert answers == [200] * 8
    never = server.http.post("/v1/completions", json={**PROMPT, "n": 100})
    assert_error(never, 400, code="too_many_sequences", param="n")


# ---- clients that leave ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_leaves_ends_its_request(server: RunningServer, stream: bool, started: bool) -> None:
    """Within 100 ms of the connection's end the engine hears of it, before the first token and after."""
    server.engine.holds = not started
    body = json.dumps({**FOREVER, "stream": stream, "n": 2}).encode()
    connection = raw_post(server, "/v1/completions", body, f"content-length: {len(body)}\r\n")
    server.until(lambda: len(server.engine.requests) == 2)
    if started:
        server.until(lambda: any(running.token_ids for running in server.engine.requests.values()))
    num_heard = len(server.engine.heard)
    connection.close()
    took_s = server.until(lambda: not server.state.front.requests)
    assert took_s < 0.1 * 5, "five times the promise: this machine may be busy"
    server.until(lambda: not server.engine.requests)
    assert [type(message) for message in server.engine.heard[num_heard:]] == [CancelRequest, CancelRequest]


def test_leaving_clients_harm_nobody(server: RunningServer) -> None:
    """Ten clients, every other one leaves after its first bytes; the others get all their tokens."""
    texts: list[str] = []

    def ask(number: int) -> None:
        body = {**FOREVER, "stream": True, "max_tokens": 200, "seed": 1}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
            if response.status_code == 429:
                return
            lines = response.iter_lines()
            next(lines)
            if number % 2:
                return
            data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        texts.append("".join(chunk["choices"][0]["text"] for chunk in data))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(texts) == 4
    assert len(set(texts)) == 1
    server.until(lambda: not server.engine.requests)
    server.until(lambda: server.state._streams == {} and server.state.front.num_in_flight == 0)


def test_an_answered_request_is_freed_without_a_collection(server: RunningServer) -> None:
    with closing(httpx.Client(base_url=server.url, timeout=30)) as client:
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for stream in (False, True) * 5:
                assert client.post("/v1/completions", json={**PROMPT, "stream": stream}).status_code == 200
            server.until(lambda: server.state.front.num_in_flight == 0)
            gc.collect()
            circular = {type(each).__name__ for each in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
    assert "RequestResponseCycle" not in circular


def test_a_silent_stream_is_kept_alive(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head comes with the first comment: until then a failure could still have a status of its own."""
    monkeypatch.setattr(state_module, "KEEP_ALIVE_S", 0.0)
    server.engine.holds = True
    body = json.dumps({**PROMPT, "stream": True}).encode()
    with closing(raw_post(server, "/v1/completions", body, f"content-length: {len(body)}\r\n")) as connection:
        server.until(lambda: bool(server.engine.requests))
        got = b""
        connection.settimeout(0.1)
        deadline_s = time.monotonic() + 20
        while got.count(KEEP_ALIVE) < 2:
            assert time.monotonic() < deadline_s
            server.on_loop(server.state.keep_alive)
            with contextlib.suppress(TimeoutError):
                got += connection.recv(65536)
        connection.settimeout(20)
        assert got.startswith(b"HTTP/1.1 200 OK")
        server.engine.holds = False
        while b"data: [DONE]\n\n" not in got:
            got += connection.recv(65536)
    assert got.count(b'"finish_reason":"length"') == 1


# ---- small endpoints ----


def test_models(server: RunningServer) -> None:
    with server.client() as client:
        cards = list(client.models.list())
        assert [card.id for card in cards] == [MODEL, "alias"]
        card = client.models.retrieve(MODEL)
    assert (card.object, card.owned_by) == ("model", "penstock")
    assert card.model_extra == {"root": "/models/tiny", "parent": None, "max_model_len": 1024}


@pytest.mark.parametrize("text", ["Once upon a time", "", "naïve 北京 😀 <|im_start|>", "long " * 800])
def test_tokenize_and_back(server: RunningServer, text: str) -> None:
    told = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    ids = TOKENIZER.encode(text)
    assert told == {
        "count": len(ids),
        "max_model_len": 1024,
        "tokens": ids,
        "token_strs": [TOKENIZER.id_to_token(i) for i in ids],
    }
    assert server.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert server.http.post("/tokenize", json={"prompt": text}).json()["token_strs"] is None


def test_tokenize_renders_conversations(server: RunningServer) -> None:
    told = server.http.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": False, "oops": 1})
    assert TOKENIZER.decode(told.json()["tokens"], skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert told.headers["x-penstock-warning"] == "ignored fields: oops"
    assert_error(server.http.post("/tokenize", json={}), 400)
    assert_error(server.http.post("/tokenize", json={"prompt": "a", "messages": MESSAGES}), 400)
    assert_error(server.http.post("/detokenize", json={"tokens": [-1]}), 400, param="tokens[0]")
    assert_error(server.http.post("/detokenize", json={"tokens": [1.5]}), 400, param="tokens[0]")


def test_health_version_load_reset(server: RunningServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ping").status_code == server.http.post("/ping").status_code == 200
    assert server.http.get("/version").json() == {"version": __version__}
    assert server.http.get("/load").json() == {"server_load": 0}
    assert server.http.post("/reset_prefix_cache").status_code == 200
    server.until(lambda: ResetPrefixCache() in server.engine.heard)
    assert server.http.get("/").status_code == 200
    assert server.http.head("/health").status_code == 200


def test_metrics_count_what_happened(server: RunningServer) -> None:
    assert server.http.post("/v1/completions", json={**PROMPT, "max_tokens": 5}).status_code == 200
    text = server.http.get("/metrics").text
    finished = next(line for line in text.splitlines() if "request_success_total{" in line and '"length"' in line)
    assert float(finished.rsplit(" ", 1)[1]) >= 1
    assert server.http.get("/metrics").headers["content-type"].startswith("text/plain")


def test_loading_and_draining_answer_503() -> None:
    with RunningServer() as server:
        front = server.state.front
        assert front.ready is not None
        server.on_loop(lambda: setattr(front, "state", "loading"))
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["progress"]) == (503, "loading", 0.5)
        assert health.headers["retry-after"] == "1"
        refused = server.http.post("/v1/completions", json=PROMPT)
        assert "reading weights (50 %)" in assert_error(refused, 503, code="loading")
        assert int(refused.headers["retry-after"]) >= 1
        assert_error(server.http.get("/v1/models"), 503)
        server.on_loop(lambda: setattr(front, "state", "ready"))
        server.engine.holds = True
        body = json.dumps({**PROMPT, "stream": True}).encode()
        with closing(raw_post(server, "/v1/completions", body, f"content-length: {len(body)}\r\n")) as connection:
            server.until(lambda: bool(server.engine.requests))
            server.on_loop(lambda: server.state.drain(time.monotonic() + 30))
            assert server.http.get("/health").json() == {"status": "draining"}
            assert_error(server.http.post("/v1/completions", json=PROMPT), 503, code="draining")
            assert server.http.get("/v1/models").status_code == 200
            server.engine.holds = False
            got = b""
            while b"data: [DONE]\n\n" not in got:
                got += connection.recv(65536)
        server.until(lambda: server.state.phase == "stopped")


def test_a_request_older_than_the_timeout_carries_its_deadline() -> None:
    with RunningServer(ServerOptions(request_timeout_s=7.0)) as server:
        server.http.post("/v1/completions", json=PROMPT)
        added: Any = server.engine.heard[0]
        assert added.deadline_s == pytest.approx(added.arrival_s + 7.0)
