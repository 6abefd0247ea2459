"""An answer that is read while it comes: in order, whole, without holding more of it than is read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from penstock.server.http_client import MAX_AHEAD, BrokenAnswer, HttpServer, OpenAnswer

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def against(serve: Serve, use: Callable[[HttpServer], Awaitable[None]]) -> None:
    async def run() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                await serve(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        async with asyncio.timeout(30):
            server = await asyncio.start_server(answer, "127.0.0.1", 0)
            http = HttpServer(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await use(http)
            http.close()
            server.close()

    asyncio.run(run())


def test_a_slow_reader_holds_its_sender_back() -> None:
    num_bytes, sent = 64 * MAX_AHEAD, [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: x/y\r\ncontent-length: %d\r\n\r\n" % num_bytes)
        while sent[0] < num_bytes:
            writer.write(bytes([sent[0] // MAX_AHEAD]) * MAX_AHEAD)
            await writer.drain()
            sent[0] += MAX_AHEAD

    async def use(http: HttpServer) -> None:
        answer = OpenAnswer(http, http.request("GET", "/"))
        first = await answer.next()
        assert answer.status == 200 and answer.headers["content-type"] == "x/y"
        await asyncio.sleep(0.3)
        assert sent[0] < num_bytes  # it waits for us
        whole = first + await answer.rest()
        assert len(whole) == num_bytes and whole[-1] == 63 and whole[MAX_AHEAD] == 1
        await answer.close()

    against(serve, use)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc"])
def test_an_answer_that_breaks_off(head: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await writer.drain()

    async def use(http: HttpServer) -> None:
        answer = OpenAnswer(http, http.request("GET", "/"))
        with pytest.raises(BrokenAnswer):
            await answer.rest()
        await answer.close()

    against(serve, use)


def test_other_statuses_come_whole() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 No\r\nRetry-After: 3\r\ncontent-length: 4\r\n\r\nbusy")
        await writer.drain()

    async def use(http: HttpServer) -> None:
        answer = OpenAnswer(http, http.request("GET", "/"))
        assert await answer.rest() == b"busy"
        assert answer.status == 503 and answer.headers["retry-after"] == "3"
        await answer.close()

    against(serve, use)
