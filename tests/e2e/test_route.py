"""`penstock route` before real servers: answers, choices, deaths, two routers at once, prefill and decode apart."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from tests.e2e.pd import handoffs, prompt
from tests.e2e.serving import MODEL, RealServer, assert_error, streaming, until
from tests.ports import free_port

from penstock.server.kv_transfer import offered

FLAGS = (
    "--kv-cache-memory-bytes",
    "32M",
    "--disable-log-stats",
    "--generation-config",
    "vllm",
    "--max-num-batched-tokens",
    "128",
    "--pd-min-tokens",
    "64",
    "--kv-lease-s",
    "1",
    "--kv-role",
    "both",
)
ALWAYS = ("--pd-min-tokens", "64", "--pd-max-short-output", "0")  # hand over whatever the answer is
MESSAGES = [{"role": "user", "content": "Tell me of a boat."}]


def router(*arguments: str) -> RealServer:
    """A router; it is there once an engine is."""
    return RealServer(*arguments, "--health-interval", "0.2", model="", verb="route")


class Engine(RealServer):
    """A server that publishes its cache's events and may hand prompts over. Ids of the ports are its own."""

    def __init__(self, secret: str) -> None:
        self.events, self.replay = free_port(), free_port()
        settings = {
            "enable_kv_cache_events": True,
            "endpoint": f"tcp://127.0.0.1:{self.events}",
            "replay_endpoint": f"tcp://127.0.0.1:{self.replay}",
        }
        super().__init__(*FLAGS, "--cluster-secret", secret, "--kv-events-config", json.dumps(settings))

    @property
    def name(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def told(self) -> str:
        return f"{self.url},events=tcp://127.0.0.1:{self.events},replay=tcp://127.0.0.1:{self.replay}"


@dataclass(frozen=True)
class Fleet:
    a: Engine
    b: Engine
    stranger: Engine  # of another cluster; the last test kills it
    first: RealServer
    second: RealServer
    apart: RealServer  # prefill at a, decode at b


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with ExitStack() as stack:
        a, b, stranger = (stack.enter_context(Engine(secret)) for secret in ("one", "one", "other"))
        for server in (a, b, stranger):
            server.until_ready()
        both = ("--model", MODEL, "--engine", a.told, "--engine", b.told)
        apart = ("--model", MODEL, "--prefill", a.told, "--decode", b.told, *ALWAYS)
        servers = [stack.enter_context(router(*arguments)) for arguments in (both, both, apart)]
        for server in servers:
            until(lambda server=server: num_up(server) == 2, what="meeting both engines")
        yield Fleet(a, b, stranger, *servers)
        for server in (a, b):
            assert server.errors() == ""


def num_up(server: RealServer) -> int:
    try:
        engines = server.http.get("/health").json()["engines"]
    except httpx.TransportError:  # nobody listens yet
        return 0
    return sum(engine["is_up"] for engine in engines.values())


def body(num_tokens: int, number: int, /, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": prompt(num_tokens, number), "max_tokens": 8, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **fields,
    }  # fmt: skip


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


def known_blocks(server: RealServer, engine: Engine) -> int:
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith("penstock:route_known_blocks{") and engine.name in line:
            return int(float(line.rsplit(" ", 1)[1]))
    return 0


def test_answers_are_the_engines_own(fleet: Fleet) -> None:
    for number, fields in enumerate(({}, {"n": 2, "temperature": 0.9, "seed": 5}, {"logprobs": 2})):
        asked = body(70, number, **fields)
        direct = fleet.a.post("/v1/completions", asked).json()
        routed = fleet.first.post("/v1/completions", asked)
        assert routed.status_code == 200
        assert routed.headers["x-penstock-engine"] in (fleet.a.name, fleet.b.name)
        assert routed.json()["choices"] == direct["choices"]
        with streaming(fleet.first, "/v1/completions", asked) as events:
            streamed = [choice for each in events for choice in each["choices"]]
        for choice in direct["choices"]:
            mine = [each for each in streamed if each["index"] == choice["index"]]
            assert "".join(each["text"] for each in mine) == choice["text"]
            assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_official_client_and_small_endpoints(fleet: Fleet) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = fleet.first.client().chat.completions.create(**asked)
    direct = fleet.b.client().chat.completions.create(**asked)
    assert whole.choices[0].message.content == direct.choices[0].message.content
    pieces = [
        c.choices[0].delta.content or "" for c in fleet.first.client().chat.completions.create(**asked, stream=True)
    ]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [model.id for model in fleet.first.client().models.list()] == [MODEL]
    request_id = fleet.first.post("/v1/completions", body(40, 7), **{"x-request-id": "who-asks"}).headers[
        "x-request-id"
    ]
    assert request_id == "who-asks"
    told = fleet.first.http.get("/explain/who-asks").json()
    assert told["route"]["engine"] == told["engine"] and told["prompt_tokens"] == 40 and told["spans"]
    recent = fleet.first.http.get("/routes/recent").json()["routes"]
    assert recent[0]["request_id"] == "who-asks" and recent[0]["outcome"] == "stop"
    assert_error(fleet.first.http.get("/explain/nobody"), 404, code="request_not_found")


def test_what_is_wrong_is_said_as_by_an_engine(fleet: Fleet) -> None:
    message = assert_error(fleet.first.post("/v1/completions", body(8, 1, model="gpt-7")), 404, "model")
    assert MODEL in message
    assert_error(fleet.first.post("/v1/completions", {"prompt": 5}), 400, "prompt")
    assert_error(fleet.first.post("/v1/chat/completions", {"messages": "hello"}), 400)
    assert_error(fleet.first.http.post("/v1/completions", content=b"{"), 400)
    assert_error(fleet.first.post("/v1/completions", body(8, 1), **{"x-penstock-hops": "4"}), 508, code="loop_detected")
    assert_error(fleet.apart.post("/v1/completions", body(100, 1, temperature=-1)), 400, "temperature")


def test_a_client_that_leaves_is_gone_for_the_engine_too(fleet: Fleet) -> None:
    for path, asked in (
        ("/v1/completions", body(30, 30, max_tokens=1900)),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1900, "ignore_eos": True}),
    ):
        with streaming(fleet.first, path, asked) as events:
            next(events)
        for engine in (fleet.a, fleet.b):
            engine.until_idle()
    until(lambda: fleet.first.http.get("/routes/recent").json()["routes"][0]["outcome"] == "abort", what="saying so")


def test_requests_follow_what_caches_hold(fleet: Fleet) -> None:
    """Also at a router that did not send them there: both hear the engines' events."""
    for seed in range(40, 44):
        before = {engine.name: known_blocks(fleet.second, engine) for engine in (fleet.a, fleet.b)}
        engine = fleet.first.post("/v1/completions", body(600, seed)).headers["x-penstock-engine"]
        held = next(each for each in (fleet.a, fleet.b) if each.name == engine)
        until(lambda: known_blocks(fleet.second, held) >= before[engine] + 18, what="the events' arrival")  # noqa: B023
        again = fleet.second.post("/v1/completions", body(600, seed))
        assert again.headers["x-penstock-engine"] == engine
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 576
        route = fleet.second.http.get("/routes/recent").json()["routes"][0]
        assert route["hit_tokens"] >= 576 and route["engine"] == engine


def test_two_routers_at_once(fleet: Fleet) -> None:
    def ask(number: int) -> list[list[int]]:
        server = (fleet.first, fleet.second)[number % 2]
        response = server.post("/v1/completions", body(150, 60 + number % 6))
        assert response.status_code == 200, response.text
        return tokens(response.json())

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    for number in range(6):
        assert all(answer == answers[number] for answer in answers[number::6])
    assert answers[0] == tokens(fleet.a.post("/v1/completions", body(150, 60, cache_salt="new")).json())


def test_a_router_that_comes_later_and_dies(fleet: Fleet) -> None:
    """Its index comes from the replay; the engine that holds a prompt is found though nobody sent anything since. When
    it is killed, its calls end at the engines, and other routers notice nothing."""
    holder = fleet.b if fleet.b.post("/v1/completions", body(500, 80)).status_code == 200 else fleet.a
    with router("--model", MODEL, "--engine", fleet.a.told, "--engine", fleet.b.told) as late:
        until(lambda: num_up(late) == 2, what="meeting both engines")
        until(lambda: known_blocks(late, holder) >= 15, what="the replay")
        assert late.post("/v1/completions", body(500, 80)).headers["x-penstock-engine"] == holder.name
        with (
            pytest.raises(httpx.TransportError),
            streaming(late, "/v1/completions", body(30, 81, max_tokens=1900)) as told,
        ):
            next(told)
            late.process.kill()
            list(told)
    for engine in (fleet.a, fleet.b):
        engine.until_idle()
    assert fleet.first.post("/v1/completions", body(30, 81)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_prefill_and_decode_at_two_servers(fleet: Fleet, stream: bool) -> None:
    before = handoffs(fleet.b)
    for number, fields in enumerate(({}, {"n": 2, "temperature": 0.8, "seed": 3}, {"min_tokens": 4, "max_tokens": 20})):
        asked = body(500 + 13 * number, 100 + number + 10 * stream, **fields)
        expected = fleet.stranger.post("/v1/completions", asked).json()
        if stream:
            with streaming(fleet.apart, "/v1/completions", asked) as events:
                found = [choice for each in events for choice in each["choices"]]
            for choice in expected["choices"]:
                mine = [each for each in found if each["index"] == choice["index"]]
                assert "".join(each["text"] for each in mine) == choice["text"]
        else:
            response = fleet.apart.post("/v1/completions", asked)
            assert response.headers["x-penstock-engine"] == fleet.b.name
            assert tokens(response.json()) == tokens(expected)
    until(lambda: handoffs(fleet.b)["received"] >= before.get("received", 0) + 3, what="counting hand-offs")
    assert handoffs(fleet.b)["failed"] == 0
    [route] = fleet.apart.http.get("/routes/recent").json()["routes"][:1]
    assert route["prefill_at"] == [fleet.a.name]


def test_a_prefill_server_that_is_gone_costs_a_lease(fleet: Fleet) -> None:
    """P has answered and is not there when D asks for the blocks: D computes the prompt."""
    asked = body(400, 120)
    address = f"tcp://127.0.0.1:{free_port()}"
    first = fleet.a.post(
        "/v1/completions", {**asked, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    )
    kind = first.json()["kv_transfer_params"]["remote_kv"]
    gone = fleet.stranger.post("/v1/completions", {**asked, "kv_transfer_params": offered(address, kind, "other")})
    assert tokens(gone.json()) == tokens(fleet.a.post("/v1/completions", asked).json())
    until(lambda: "nothing was heard for 1.0 s" in fleet.stranger.errors(), what="saying so")
    assert address in fleet.stranger.errors()


def test_servers_that_do_not_belong_together_say_so(fleet: Fleet) -> None:
    asked = body(200, 130)
    first = fleet.a.post(
        "/v1/completions", {**asked, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    )
    params = first.json()["kv_transfer_params"]
    assert params["do_remote_prefill"] is True and params["remote_host"] == "127.0.0.1"
    refused = fleet.stranger.post("/v1/completions", {**asked, "kv_transfer_params": params})
    message = assert_error(refused, 400, "kv_transfer_params", "kv_peer_refused")
    assert f"tcp://127.0.0.1:{params['remote_port']} and tcp://127.0.0.1:" in message and "--cluster-secret" in message
    alien = {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 9, "remote_block_ids": [1]}
    assert_error(fleet.b.post("/v1/completions", {**asked, "kv_transfer_params": alien}), 400, code="kv_peer_refused")
    with router("--model", MODEL, "--prefill", fleet.a.url, "--decode", fleet.stranger.url, *ALWAYS) as wrong:
        until(lambda: num_up(wrong) == 2, what="meeting both engines")
        assert_error(wrong.post("/v1/completions", body(400, 131)), 400, code="kv_peer_refused")


class Breaker:
    """Something that says it is a server of the model, and breaks every request off."""

    def __init__(self) -> None:
        self.num_asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = json.dumps({"data": [{"id": MODEL}]} if self.path == "/v1/models" else {}).encode()
                self.send_response(404 if self.path == "/metrics" else 200)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_POST(self) -> None:
                outer.num_asked += 1
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> Breaker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def test_requests_outlive_engines(fleet: Fleet) -> None:
    """One URL is dead from the start, one server breaks everything off, one is killed while it answers."""
    doomed, nowhere = fleet.stranger, f"http://127.0.0.1:{free_port()}"
    with Breaker() as breaker, ExitStack() as stack:
        some = [word for url in (fleet.a.url, breaker.url, doomed.url, nowhere) for word in ("--engine", url)]
        spread = stack.enter_context(router(*some, "--route-policy", "round_robin"))
        until(lambda: num_up(spread) == 3, what="meeting all but one")
        expected = tokens(fleet.a.post("/v1/completions", body(90, 150)).json())
        for _ in range(6):
            response = spread.post("/v1/completions", body(90, 150))
            assert response.status_code == 200 and tokens(response.json()) == expected
        assert breaker.num_asked > 0
        assert max(r["num_tries"] for r in spread.http.get("/routes/recent").json()["routes"]) == 2

        os.kill(doomed.process.pid, signal.SIGSTOP)  # it takes calls and says nothing
        for _ in range(3):
            assert tokens(spread.post("/v1/completions", body(90, 150)).json()) == expected
        until(lambda: num_up(spread) <= 2, what="noticing its silence")
        os.kill(doomed.process.pid, signal.SIGCONT)

        lonely = stack.enter_context(router("--engine", doomed.url))
        until(lambda: num_up(lonely) == 1, what="meeting the one that is killed")
        with streaming(lonely, "/v1/completions", body(30, 151, max_tokens=1500)) as events:
            next(events)
            engine_pid = doomed.engine_pid()
            for pid in (doomed.process.pid, engine_pid):
                os.kill(pid, signal.SIGKILL)
            last = list(events)[-1]
        assert last["error"]["code"] == "engine_lost" and doomed.name in last["error"]["message"]
        assert_error(lonely.post("/v1/completions", body(30, 152)), 503, code="no_engine")
        assert lonely.http.get("/health").status_code == 503
        for _ in range(4):
            assert tokens(spread.post("/v1/completions", body(90, 150)).json()) == expected
        until(lambda: num_up(lonely) == 0 and num_up(spread) <= 2, what="noticing it")
        for server in (spread, lonely):
            server.process.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0


def test_decode_goes_on_without_its_prefill_server(fleet: Fleet) -> None:
    with router("--prefill", f"http://127.0.0.1:{free_port()}", "--decode", fleet.b.url, *ALWAYS) as alone:
        until(lambda: num_up(alone) == 1, what="meeting the decode engine")
        expected = tokens(fleet.a.post("/v1/completions", body(300, 170)).json())
        assert tokens(alone.post("/v1/completions", body(300, 170)).json()) == expected
