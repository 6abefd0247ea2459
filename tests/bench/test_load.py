"""The load generator against a small server made by hand: arrivals, concurrency, connections, and what breaks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bench.load import Run, Shot, arrivals, fire, run_load
from penstock.config.values import ConfigError
from penstock.server.http_client import BrokenAnswer, HttpServer

EVENT = b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n'
Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 200), rate=st.floats(0.01, 1e4), burstiness=st.sampled_from([0.1, 0.5, 1.0, 4.0, float("inf")])
)
def test_arrivals_fill_the_time_that_the_rate_says(num: int, rate: float, burstiness: float) -> None:
    times = arrivals(num, rate, burstiness, np.random.default_rng(1))
    assert len(times) == num
    assert all(earlier <= later for earlier, later in pairwise([0.0, *times]))
    assert times[-1] == pytest.approx(num / rate)
    if burstiness == float("inf"):
        assert times == pytest.approx([(n + 1) / rate for n in range(num)])


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(arrivals(20_000, 10.0, burstiness, np.random.default_rng(0)))
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrivals(3, float("inf"), 1.0, np.random.default_rng(0)) == [0.0] * 3


class Served:
    """A server on a free port: hands each request to `handler`, and counts connections."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.num_connections = self.num_now = self.most = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                self.num_now += 1
                self.most = max(self.most, self.num_now)
                try:
                    await self.handler(head, reader, writer)
                    await writer.drain()
                finally:
                    self.num_now -= 1
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[tuple[HttpServer, Served]]:
    served = Served(handler)
    server = await asyncio.start_server(served, "127.0.0.1", 0)
    client = HttpServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    try:
        yield client, served
    finally:
        client.close()
        server.close()
        await asyncio.wait_for(asyncio.gather(*served.tasks), 10)


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head + body + (b"0\r\n\r\n" if end else b"")


def shot(client: HttpServer, at_s: float = 0.0) -> Shot:
    return Shot(client.request("POST", "/v1/completions", b"{}"), 3, at_s)


def test_requests_share_connections_and_keep_the_limit() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert head.startswith(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:")
        await asyncio.sleep(0.005)
        writer.write(chunked(EVENT[:20], EVENT[20:]))

    async def main() -> tuple[Run, Served]:
        async with serving(answer) as (client, served):
            return await run_load(client, [shot(client) for _ in range(30)], max_concurrency=4), served

    run, served = asyncio.run(main())
    assert [outcome.error for outcome in run.outcomes] == [""] * 30
    assert served.most == 4
    assert served.num_connections == 4
    assert all(outcome.asked_s <= outcome.start_s <= outcome.end_s for outcome in run.outcomes)
    waits = [outcome.start_s - outcome.asked_s for outcome in run.outcomes]
    assert max(waits) > 0.015  # the last ones waited for their turn, and it is not part of their latency
    assert run.duration_s >= 7 * 0.005


def test_shots_leave_at_their_times() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(EVENT))

    async def main() -> Run:
        async with serving(answer) as (client, _):
            return await run_load(client, [shot(client, at_s) for at_s in (0.1, 0.0, 0.2)])

    run = asyncio.run(main())
    starts = [outcome.start_s - run.outcomes[0].start_s for outcome in run.outcomes]
    assert starts[1] >= 0.09
    assert starts[2] >= 0.19


def test_a_refusal_and_broken_answers_are_outcomes() -> None:
    answers = [
        b'HTTP/1.1 429 Too Many\r\ncontent-length: 8\r\n\r\n{"no":1}',
        chunked(EVENT[:10], end=False),
        b"SSH-2.0-nothing here\r\n\r\n",
        chunked(b'data: {"error": {"message": "died"}}\n\n'),
        chunked(EVENT),
    ]

    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers.pop(0))
        if len(answers) in (2, 3):
            writer.close()

    async def main() -> list[str]:
        async with serving(answer) as (client, _):
            return [(await fire(client, shot(client), 5.0)).error for _ in range(5)]

    errors = asyncio.run(main())
    assert errors[0] == '429: {"no":1}'
    assert "the connection broke" in errors[1]
    assert "not HTTP" in errors[2]
    assert errors[3] == "died"
    assert errors[4] == ""  # what came before does no harm


def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(EVENT))
        writer.close()  # without saying so in a header

    async def main() -> tuple[list[str], Served]:
        async with serving(answer) as (client, served):
            errors = [(await fire(client, shot(client), 5.0)).error for _ in range(3)]
            return errors, served

    errors, served = asyncio.run(main())
    assert errors == [""] * 3
    assert served.num_connections == 3


def test_leaving_closes_the_connection() -> None:
    left = []

    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(EVENT, end=False))
        try:
            left.append(await reader.read())
        except ConnectionError:  # a reset, as the system likes
            left.append(b"")

    async def main() -> None:
        async with serving(answer) as (client, _):
            seen: list[bytes] = []
            request = client.request("POST", "/v1/completions", b"{}")
            task = asyncio.ensure_future(client.exchange(request, lambda body, now_s: seen.append(body)))
            while not seen:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(BrokenAnswer, match="within 0.05 s"):
                await client.exchange(request, lambda body, now_s: None, 0.05)
            deadline_s = time.monotonic() + 5
            while len(left) < 2 and time.monotonic() < deadline_s:
                await asyncio.sleep(0.001)

    asyncio.run(main())
    assert left == [b"", b""]


def test_nobody_there() -> None:
    async def main() -> str:
        return (await fire(HttpServer("http://127.0.0.1:9"), Shot(b"x", 1))).error

    assert "no connection to http://127.0.0.1:9" in asyncio.run(main())


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:99999"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        HttpServer(url)


def test_a_url_may_have_a_path() -> None:
    server = HttpServer("https://host/proxy/v1/")
    assert (server.port, server.prefix) == (443, "/proxy")
    assert server.request("GET", "/v1/models").startswith(b"GET /proxy/v1/models HTTP/1.1\r\nhost: host\r\n")
