"""The head of a request is bounded in size, whatever comes after it."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from penstock.server.http_limits import MAX_HEAD_BYTES, BoundedHead


async def app(scope: dict, receive, send) -> None:  # type: ignore[no-untyped-def,type-arg]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answer(*parts: bytes) -> bytes:
    """What a fresh server answers to `parts`, sent one by one; it is stopped afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, http=BoundedHead, ws="none", lifespan="off", log_config=None))
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
        try:
            for part in parts:
                writer.write(part)
                try:
                    await asyncio.wait_for(writer.drain(), 5)
                except ConnectionError:
                    break
                await asyncio.sleep(0.01)
            return await asyncio.wait_for(reader.read(4096), 5)
        finally:
            writer.close()
            server.should_exit = True
            await serving


def test_an_endless_head_is_ended() -> None:
    head = b"GET / HTTP/1.1\r\nhost: x\r\nx-long: "
    found = asyncio.run(answer(head, b"a" * MAX_HEAD_BYTES))
    assert found.startswith(b"HTTP/1.1 431 ")
    head_bytes, body = found.split(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head_bytes


def test_a_large_body_behind_a_small_head_is_no_head() -> None:
    body = b"b" * (4 * MAX_HEAD_BYTES)
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert asyncio.run(answer(head + body)).startswith(b"HTTP/1.1 200 ")
    again = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    assert asyncio.run(answer(again, again)).count(b"HTTP/1.1 200 ") >= 1


def test_of_pipelined_requests_the_first_is_answered() -> None:
    again = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    found = asyncio.run(answer(again * 5))
    assert found.count(b"HTTP/1.1 200 ") == 1


def test_a_client_that_pipelines_and_leaves_is_noticed() -> None:
    left = []

    async def endless(scope: dict, receive, send) -> None:  # type: ignore[no-untyped-def,type-arg]
        await receive()
        left.append((await asyncio.wait_for(receive(), 5))["type"])

    async def leave() -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            config = uvicorn.Config(endless, http=BoundedHead, ws="none", lifespan="off", log_config=None)
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve(sockets=[sock]))
            _, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n" * 3)
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.close()
            for _ in range(100):
                if left:
                    break
                await asyncio.sleep(0.05)
            server.should_exit = True
            await serving

    asyncio.run(leave())
    assert left == ["http.disconnect"]
