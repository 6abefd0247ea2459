"""uvicorn's HTTP/1.1 protocol with a bound on the head of a request: its size, and the time it may take.

The parser would collect headers without end, before anyone could look at a key. And no pipelining: with a second
request waiting uvicorn reads no further, so that nobody would see the client leave. Knows no route and no body.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: 111\r\n\r\n"
    b'{"error":{"message":"the request head is larger than 64 KiB","type":"BadRequestError","param":null,"code":431}}'
)


class BoundedHead(HttpToolsProtocol):
    """Answers 431 and closes when the head grows too large; closes when it is not complete in time."""

    _in_head = False
    _num_bytes = 0
    _timer: asyncio.TimerHandle | None = None
    _is_deaf = False

    def data_received(self, data: bytes) -> None:
        """Parse, then count what still belongs to an unfinished head."""
        if self._is_deaf:
            return
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._num_bytes += len(data)
            if self._num_bytes > MAX_HEAD_BYTES:
                self.transport.write(TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_deaf = True  # what was asked first is answered, then the connection ends
            self.cycle.keep_alive = False
            return
        super().on_message_begin()
        self._in_head, self._num_bytes = True, 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def on_url(self, url: bytes) -> None:
        if not self._is_deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_deaf:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        if not self._is_deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_deaf:
            super().on_message_complete()

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        self._end_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)
        # Request and connection refer to each other: only a rare collection would free them.
        self.cycle = None  # type: ignore[assignment]

    def _end_head(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
