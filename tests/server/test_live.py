"""The live page's server side: what the observer sees, JSON against its schema, the event stream over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from tests.server import page_schema
from tests.server.page_schema import problems
from tests.server.synthetic_messages import READY, record, report

from penstock.config.schema import Config
from penstock.core.request import SamplingParams
from penstock.engine.messages import (
    Explain,
    Failed,
    Fatal,
    FromEngine,
    Record,
    RequestRecord,
    Span,
    ToEngine,
    Watch,
)
from penstock.server import live as live_module
from penstock.server.live import PAGES, Live


class Clock:
    """A clock of the engine and one of the wall, moved by the test."""

    def __init__(self) -> None:
        self.now, self.offset = 100.0, 1.7e9

    def mono(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.offset


def make(clock: Clock, config: Config | None = None) -> tuple[Live, list[ToEngine]]:
    sent: list[ToEngine] = []
    live = Live(config or Config(), "tiny", sent.append, clock.mono, clock.wall)
    return live, sent


# ---- observer ----


def test_latencies_come_from_what_the_observer_sees() -> None:
    clock = Clock()
    live, _ = make(clock)
    live.received("a", 40, SamplingParams(), 100.0)
    live.emitted("a", 1, 100.5)
    live.emitted("a", 1, 100.6)
    live.emitted("a", 4, 101.0)  # four gaps of 0.1
    live.emitted("a", 0, 102.0)
    clock.now = 101.0
    live.tick()
    row = live.series.row
    assert row is not None
    assert row["time_to_first_token_seconds_p50"] == pytest.approx(0.5)
    assert row["inter_token_latency_seconds_p99"] == pytest.approx(0.1, abs=1e-6)
    clock.now = 101.5
    live.received("b", 40, SamplingParams(), 101.2)
    live.emitted("b", 3, 101.4)
    live.tick()
    assert live.series.num_generated == 9
    assert live.series.row is not None and live.series.row["generation_tokens_per_s"] == pytest.approx(9 / 2)


def test_nothing_is_asked_of_the_engine_and_nothing_built_while_nobody_listens() -> None:
    clock = Clock()
    live, sent = make(clock)
    live.message(READY, 100.0)
    for _ in range(20):
        clock.now += 0.5
        live.tick()
    assert sent == []
    assert live.seq == 20 and len(live.series.columns()["ts"]) == 20


def test_finished_requests_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "MAX_EXPLAINED", 3)
    live, _ = make(Clock())
    for number in range(5):
        live.received(f"r{number}", 4, SamplingParams(), 100.0)
        live.finished(f"r{number}", None, "stop", 101.0)
    assert list(live._finished) == ["r2", "r3", "r4"] and live._running == {}
    live.finished("unknown", None, "stop", 101.0)
    assert len(live._finished) == 3


def test_a_set_wall_clock_moves_the_times() -> None:
    clock = Clock()
    live, _ = make(clock)
    live.tick()
    clock.offset += 3600
    live.tick()
    assert live.series.columns()["ts"] == [1.7e9 + 100, 1.7e9 + 3700]


# ---- over a socket ----


class Peer:
    """An engine that answers Watch and Explain from a script, in the event loop of the server."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.live: Live | None = None
        self.records: dict[str, RequestRecord] = {}
        self.answers = True

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)
        if not self.answers:
            return
        if isinstance(message, Watch):
            self.later(report(time.monotonic(), requests=tuple(self.records.values())))
        elif isinstance(message, Explain):
            found = self.records.get(message.request_id)
            self.later(Failed(message.request_id, 404, "no such request") if found is None else Record(found))

    def later(self, message: FromEngine) -> None:
        assert self.live is not None
        asyncio.get_running_loop().call_soon(self.live.message, message, time.monotonic())

    def run(self, request_id: str, num_tokens: int = 3) -> None:
        """A request that arrived 2 s ago, waited half a second and gives tokens since one."""
        assert self.live is not None
        now = time.monotonic()
        spans = [
            Span("queue", now - 2, now - 1.5),
            Span("prefill", now - 1.5, now - 1, 8),
            Span("decode", now - 1, None),
        ]
        self.records[request_id] = record(request_id, arrival_s=now - 2, admitted_s=now - 1.5, spans=spans)
        self.live.received(request_id, 40, SamplingParams(), now - 2)
        for k in range(num_tokens):
            self.live.emitted(request_id, 1, now - 1 + 0.1 * k)


class Served:
    """A server on a free port with nothing but the live routes."""

    def __init__(self, base: str, live: Live, peer: Peer) -> None:
        self.base, self.live, self.peer = base, live, peer
        self.client = httpx.AsyncClient(base_url=base, timeout=10)


@contextlib.asynccontextmanager
async def serve(ready: bool = True) -> AsyncIterator[Served]:
    peer = Peer()
    live = peer.live = Live(Config(), "tiny", peer.send)
    if ready:
        live.message(READY, time.monotonic())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        live.start()
        yield
        await live.stop()

    app = Starlette(routes=live.routes(), lifespan=lifespan)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    task = asyncio.create_task(server.serve([listening]))
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        async with asyncio.timeout(20):
            while not server.started:
                await asyncio.sleep(0.01)
            served = Served(base, live, peer)
            async with served.client:
                yield served
    finally:
        server.should_exit = True
        await task


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, int | None, Any]]:
    """(event, id, data) from a stream of server-sent events."""
    name, id_, data = "message", None, ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("id: "):
            id_ = int(line[4:])
        elif line.startswith("data: "):
            data = line[6:]
        elif not line and data:
            yield name, id_, json.loads(data)
            name, id_, data = "message", None, ""


def valid(value: Any, schema: Any) -> Any:
    assert list(problems(value, schema)) == []
    return value


def test_the_stream_says_hello_then_snapshots_then_bye() -> None:
    async def scenario() -> None:
        async with serve() as served:
            served.peer.run("a")
            names, seqs, with_requests = [], [], []
            async with served.client.stream("GET", "/live") as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                assert response.headers["cache-control"].startswith("no-store")
                async for name, seq, data in events(response):
                    names.append(name)
                    if name == "hello":
                        valid(data, page_schema.HELLO)
                        assert data["engines"][0]["kv"] == {"block_size": 32, "num_blocks": 100}
                    elif name == "snapshot":
                        valid(data, page_schema.SNAPSHOT)
                        assert data["seq"] == seq
                        seqs.append(seq)
                        with_requests.append(data["requests"] is not None)
                        if len(seqs) == 4:
                            stopping = asyncio.create_task(served.live.stop())
                    elif name == "bye":
                        break
                await stopping
            assert names == ["hello", *["snapshot"] * 4, "bye"]
            assert seqs == list(range(seqs[0], seqs[0] + 4))
            assert with_requests[0] and with_requests[1:].count(True) in (1, 2)
            assert any(isinstance(message, Watch) for message in served.peer.sent)
            assert (await served.client.get("/live")).status_code == 503

    asyncio.run(scenario())


def test_a_snapshot_as_one_document_shows_running_and_finished_requests() -> None:
    async def scenario() -> None:
        async with serve() as served:
            for name in ("done", "run"):
                served.peer.run(name)
            served.live.finished("done", served.peer.records.pop("done"), "length", time.monotonic())
            served.live.received("new", 7, SamplingParams(), time.monotonic())
            snapshot = valid((await served.client.get("/live/snapshot")).json(), page_schema.SNAPSHOT)
            (kv,) = [engine["kv"] for engine in snapshot["engines"]]
            assert sum(kv[state] for state in ("used", "shared", "filling", "cached", "free")) == kv["num_blocks"]
            assert kv["map"]["cells"] == "u20s5f5c30.40"  # it was asked for, and waited for
            assert snapshot["totals"]["kv_cache_usage_perc"] == pytest.approx(0.3)
            assert snapshot["totals"]["num_requests_waiting_by_reason"] == {"budget": 1}
            rows = {row["request_id"]: row for row in snapshot["requests"]}
            assert [row["request_id"] for row in snapshot["requests"]] == ["run", "new", "done"]
            assert (rows["run"]["state"], rows["run"]["cached_tokens"]) == ("decode", 32)
            assert [span["kind"] for span in rows["run"]["spans"]] == ["queue", "prefill", "decode"]
            assert rows["run"]["spans"][-1]["end_ts"] is None
            assert abs(rows["run"]["arrival_ts"] - (time.time() - 2)) < 1.0
            assert (rows["new"]["state"], rows["new"]["spans"][0]["kind"]) == ("waiting", "queue")
            assert (rows["done"]["state"], rows["done"]["finish_reason"]) == ("finished", "length")
            assert rows["done"]["spans"][-1]["end_ts"] is not None
            hello = valid((await served.client.get("/live/snapshot?hello=1")).json(), page_schema.HELLO)
            assert hello["spec"] is None and len(hello["engines"]) == 1

    asyncio.run(scenario())


def test_a_snapshot_before_the_first_report_has_nulls_and_no_zeros() -> None:
    clock = Clock()
    live, _ = make(clock)
    live.message(READY, 100.0)
    live.tick()
    snapshot = valid(json.loads(msgspec.json.encode(live._snapshot(100.0, True))), page_schema.SNAPSHOT)
    assert snapshot["totals"]["num_requests_running"] is None
    assert snapshot["engines"][0]["kv"]["used"] is None and snapshot["engines"][0]["kv"]["map"] is None
    assert snapshot["handoffs"] is None and snapshot["spec_decode"] is None and snapshot["router"] is None
    assert snapshot["links"] == [] and snapshot["tiers"] == {}


def test_explain_of_a_running_request_asks_the_engine() -> None:
    async def scenario() -> None:
        async with serve() as served:
            served.peer.run("a")
            told = valid((await served.client.get("/explain/a")).json(), page_schema.EXPLAIN)
            assert served.peer.sent == [Explain("a")]
            assert told["finish_reason"] is None and told["generation_tokens"] == 3
            assert told["time_to_first_token_s"] == pytest.approx(1.0, abs=1e-3)
            assert told["tokens_per_s"] == pytest.approx(10.0, rel=1e-3)
            assert told["queue_reason"] == "all places for running requests were taken"
            assert [s["kind"] for s in told["spans"]] == ["queue", "prefill", "decode"]
            assert told["spans"][0]["start_s"] == 0 and told["spans"][1]["num_tokens"] == 8
            assert told["spans"][2]["num_tokens"] == 2 and told["spans"][2]["end_s"] >= 2
            assert [(r["source"], r["start"], r["end"]) for r in told["prefix"]["runs"]] == [
                ("device", 0, 32),
                ("compute", 32, 40),
            ]
            assert told["prefix"]["miss"]["reason"] == "diverged"

    asyncio.run(scenario())


def test_explain_knows_the_ids_that_clients_know() -> None:
    async def scenario() -> None:
        async with serve() as served:
            for own in ("x.0", "x.1", "y-0"):
                served.peer.run(own)
            for asked, own in (("chatcmpl-x", "x.0"), ("x", "x.0"), ("x.1", "x.1"), ("cmpl-y", "y-0")):
                assert (await served.client.get(f"/explain/{asked}")).json()["request_id"] == own

    asyncio.run(scenario())


def test_explain_of_a_finished_request_needs_no_engine() -> None:
    async def scenario() -> None:
        async with serve() as served:
            served.peer.run("a")
            now = time.monotonic()
            served.live.finished("a", served.peer.records["a"], "stop", now)
            served.live.received("b", 5, SamplingParams(), now)
            served.live.finished("b", None, "error", now)
            told = valid((await served.client.get("/explain/a")).json(), page_schema.EXPLAIN)
            assert told["finish_reason"] == "stop" and told["spans"][-1]["end_s"] == pytest.approx(2.0, abs=0.1)
            bare = valid((await served.client.get("/explain/b")).json(), page_schema.EXPLAIN)
            assert bare["spans"] == [] and bare["prefix"] is None and bare["tokens_per_s"] is None
            assert served.peer.sent == []

    asyncio.run(scenario())


def test_explain_survives_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "ANSWER_S", 0.05)

    async def scenario() -> None:
        async with serve() as served:
            served.peer.answers = False
            served.peer.run("a")
            both = await asyncio.gather(*(served.client.get("/explain/a") for _ in range(2)))
            assert [valid(r.json(), page_schema.EXPLAIN)["spans"] for r in both] == [[], []]
            assert served.live._waiting == {}
            assert valid((await served.client.get("/live/snapshot")).json(), page_schema.SNAPSHOT)

    asyncio.run(scenario())


def test_an_unknown_request_is_404_in_the_usual_shape() -> None:
    async def scenario() -> None:
        async with serve() as served:
            response = await served.client.get("/explain/nobody")
            assert response.status_code == 404
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and "nobody" in error["message"]

    asyncio.run(scenario())


def test_before_the_engine_is_ready_there_is_nothing_to_listen_to() -> None:
    async def scenario() -> None:
        async with serve(ready=False) as served:
            for path in ("/live", "/live/snapshot"):
                response = await served.client.get(path)
                assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert (await served.client.get("/")).status_code == 200

    asyncio.run(scenario())


def test_listeners_are_sent_away_when_the_engine_dies() -> None:
    async def scenario() -> None:
        async with serve() as served:
            async with served.client.stream("GET", "/live") as response:
                seen = 0
                async for _ in events(response):
                    seen += 1
                    if seen == 2:
                        served.live.message(Fatal("out of memory"), time.monotonic())
            refused = await served.client.get("/live")
            assert refused.status_code == 503 and "out of memory" in refused.json()["error"]["message"]
            assert not served.live._listeners

    asyncio.run(scenario())


def test_a_listener_that_lags_four_snapshots_is_dropped_and_others_are_not() -> None:
    async def scenario() -> None:
        async with serve() as served:
            for number in range(200):  # rows so large that the socket's buffers are soon full
                served.peer.run(f"{'x' * 2000}{number}")
            host, port = served.base.removeprefix("http://").split(":")
            num_read = 0

            async def read() -> None:
                nonlocal num_read
                async with served.client.stream("GET", "/live") as response:
                    async for _ in events(response):
                        num_read += 1

            eager = asyncio.create_task(read())
            lazy = socket.socket()
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.setblocking(False)
            try:
                loop = asyncio.get_running_loop()
                await loop.sock_connect(lazy, (host, int(port)))
                await loop.sock_sendall(lazy, b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
                async with asyncio.timeout(20):
                    while len(served.live._listeners) < 2 or num_read < 2:
                        await asyncio.sleep(0.01)
                    while len(served.live._listeners) == 2:
                        before = num_read
                        served.live.tick()
                        while num_read == before:
                            await asyncio.sleep(0.001)
                before = num_read
                served.live.tick()
                await asyncio.sleep(0.1)
                assert num_read > before and not eager.done()
            finally:
                lazy.close()
                eager.cancel()
                await asyncio.gather(eager, return_exceptions=True)

    asyncio.run(scenario())


def test_leaving_listeners_are_forgotten_and_the_engine_is_left_alone() -> None:
    async def scenario() -> None:
        async with serve() as served:
            async with served.client.stream("GET", "/live") as response:
                async for _ in events(response):
                    break
            for _ in range(100):
                if not served.live._listeners:
                    break
                await asyncio.sleep(0.05)
            assert not served.live._listeners
            num_sent = len(served.peer.sent)
            served.live.tick()
            assert len(served.peer.sent) == num_sent

    asyncio.run(scenario())


def test_a_silent_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "KEEP_ALIVE_S", 0.05)

    async def scenario() -> None:
        async with serve() as served:
            served.live.message(READY, time.monotonic())
            async with served.client.stream("GET", "/live") as response:
                async for line in response.aiter_lines():
                    if line == ": keep-alive":
                        return
            pytest.fail("no comment")

    asyncio.run(scenario())


def test_the_page_and_its_files_are_served_with_a_strict_policy() -> None:
    async def scenario() -> None:
        async with serve() as served:
            page = await served.client.get("/")
            assert page.status_code == 200 and "text/html" in page.headers["content-type"]
            assert "default-src 'self'" in page.headers["content-security-policy"]
            for path in ("app.js", "style.css", "vendor/uPlot.iife.min.js"):
                response = await served.client.get(f"/page/{path}")
                assert response.status_code == 200, path
                assert response.headers["content-security-policy"] == page.headers["content-security-policy"]
                assert response.headers["x-content-type-options"] == "nosniff"
                again = await served.client.get(f"/page/{path}", headers={"if-none-match": response.headers["etag"]})
                assert again.status_code == 304
            assert "javascript" in (await served.client.get("/page/app.js")).headers["content-type"]
            for path in ("/page/../live.py", "/page/%2e%2e/live.py", "/page/none.js"):
                assert (await served.client.get(path)).status_code == 404

    asyncio.run(scenario())


def test_nothing_in_the_page_is_inline_or_from_elsewhere() -> None:
    """What the content security policy would block; uPlot's two files are its authors' and checked in the browser."""
    html = (PAGES / "index.html").read_text()
    assert "<style" not in html and " style=" not in html and " onclick" not in html
    assert 'src="/' not in html and 'href="/' not in html  # a proxy may serve it under a prefix
    for script in html.split("<script")[1:]:
        assert " src=" in script.split(">")[0] and script.split(">", 1)[1].startswith("</script>")
    sources = [path for path in Path(PAGES).glob("*") if path.suffix in (".js", ".css", ".html")]
    assert len(sources) > 5
    for path in sources:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text, path.name


def test_building_a_snapshot_costs_less_than_a_millisecond() -> None:
    """53 requests; the best of several rounds, so that a busy machine does not fail it. Measured: 0.4 ms."""
    live, _ = make(Clock())
    live.message(READY, 100.0)
    for number in range(53):
        live.received(f"r{number}", 40, SamplingParams(), 100.0)
    live.message(report(100.0, requests=tuple(record(f"r{number}") for number in range(53))), 100.0)
    live.tick()
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        live._event("snapshot", live._snapshot(101.0, True))
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3
