"""HTTP/1.1 for load generators and routers: kept-alive connections, answers handed over piece by piece as they arrive.

asyncio's transports and httptools' parser, both of which the server needs anyway: a client library's task switch,
wake-up and object per chunk would make the generator the bottleneck long before the server is. With one callback per
read, a streamed token costs a few microseconds here. Knows HTTP; does not know what is asked or answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import httptools

from penstock.config.values import ConfigError

OnBody = Callable[[bytes, float], None]  # (bytes, time.perf_counter() of their arrival)
MAX_KEPT = 1 << 20  # bytes of an answer that nobody reads piece by piece
CONNECT_S = 5.0
MAX_AHEAD = 1 << 18  # bytes of an answer that lie here unread before the sender has to wait


class BrokenAnswer(Exception):
    """The connection could not be made, or ended before the answer did; one line."""


@dataclass(slots=True)
class Exchange:
    """One request and its answer. `sent_s`: when it was written; `status` 0 until the answer begins."""

    on_body: OnBody
    done: asyncio.Future[None]
    sent_s: float = 0.0
    status: int = 0
    kept: list[bytes] = field(default_factory=list)  # of an answer that is not a 200
    num_kept: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case; of equal ones the last
    transport: asyncio.Transport | None = None

    def text(self) -> str:
        """The body of an answer that was refused."""
        return b"".join(self.kept).decode("utf-8", "replace")


class _Connection(asyncio.Protocol):
    """One connection. At most one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.is_open = False
        self.keeps_alive = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.is_open = True

    def begin(self, exchange: Exchange, request: bytes) -> None:
        assert self.transport is not None
        self.exchange = exchange
        exchange.transport = self.transport
        self._parser = httptools.HttpResponseParser(self)
        exchange.sent_s = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:  # bytes that nobody asked for
            self._end()
            return
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.exchange is not None:
            self.exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self.exchange is not None:
            self.exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        if exchange.status == 200:
            exchange.on_body(body, self._now_s)
        elif exchange.num_kept < MAX_KEPT:
            exchange.kept.append(body)
            exchange.num_kept += len(body)

    def on_message_complete(self) -> None:
        exchange, self.exchange = self.exchange, None
        self.keeps_alive = self._parser.should_keep_alive()
        if exchange is not None and not exchange.done.done():
            exchange.done.set_result(None)

    def eof_received(self) -> None:
        self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._fail(f"the connection broke: {error or 'closed by the server'}")

    def abort(self) -> None:
        """Leave without a word, as a client that is killed does."""
        self.exchange = None
        self._end()

    def _fail(self, why: str) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None and not exchange.done.done():
            exchange.done.set_exception(BrokenAnswer(why))
        self._end()

    def _end(self) -> None:
        self.is_open = False
        if self.transport is not None:
            self.transport.abort()


class HttpServer:
    """One server by URL, and the open connections to it. For one event loop.

    `headers` go with every request. `verify` False accepts any certificate. Raises ConfigError, which names `flag`, for
    a URL that is none.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str] | None = None, *, verify: bool = True, flag: str = "--base-url"
    ) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            raise ConfigError(f"{url} has no valid port", flag) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} is not an address such as http://127.0.0.1:8000", flag)
        self.host = parts.hostname
        self.port = port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context()
            if not verify:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        lines = {"host": parts.netloc.rpartition("@")[2], "content-type": "application/json", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._idle: list[_Connection] = []

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
        """The bytes of a request; made before the clock starts."""
        own = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self._head}{own}content-length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body

    async def exchange(
        self,
        request: bytes,
        on_body: OnBody,
        timeout_s: float | None = None,
        on_begin: Callable[[Exchange], None] | None = None,
    ) -> Exchange:
        """Send a request and wait for the end of its answer; a body of status 200 goes to `on_body` as it comes.

        `on_begin` gets the exchange before anything of it has come; once more if the request is sent once more.
        Cancelling the task, or the time-out, drops the connection: that is how a client leaves. Raises BrokenAnswer.
        """
        loop = asyncio.get_running_loop()
        while True:
            connection, is_used = await self._connection()
            exchange = Exchange(on_body, loop.create_future())
            if on_begin is not None:
                on_begin(exchange)
            connection.begin(exchange, request)
            try:
                await asyncio.wait_for(exchange.done, timeout_s)
            except BrokenAnswer:
                if is_used and exchange.status == 0:
                    continue  # the server had closed the kept connection; it has not seen the request
                raise
            except TimeoutError:
                connection.abort()
                raise BrokenAnswer(f"no end of the answer within {timeout_s:g} s") from None
            except BaseException:
                connection.abort()
                raise
            if connection.is_open and connection.keeps_alive:
                self._idle.append(connection)
            else:
                connection.abort()
            return exchange

    async def get(self, path: str, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """(status, body) of a GET. Raises BrokenAnswer."""
        pieces: list[bytes] = []
        done = await self.exchange(self.request("GET", path), lambda body, now_s: pieces.append(body), timeout_s)
        return done.status, b"".join(pieces or done.kept)

    def close(self) -> None:
        """Drop idle connections."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _connection(self) -> tuple[_Connection, bool]:
        """An open connection, and whether it was used before."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, True
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await loop.create_connection(_Connection, self.host, self.port, ssl=self._tls)
        except TimeoutError:
            raise BrokenAnswer(f"no connection to {self.url} within {CONNECT_S:g} s") from None
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise BrokenAnswer(f"no connection to {self.url}: {reason}") from None
        return made, False


class OpenAnswer:
    """An answer that is read while it comes. `close` whatever happens: before the end it drops the connection."""

    def __init__(self, server: HttpServer, request: bytes, timeout_s: float | None = None) -> None:
        self._exchange: Exchange | None = None
        self._pieces: list[bytes] = []
        self._num_ahead = 0
        self._fault: BrokenAnswer | None = None
        self.heard_s = time.monotonic()  # when it was asked, or something came last
        self._arrived = asyncio.Event()
        self._task = asyncio.ensure_future(server.exchange(request, self._take, timeout_s, self._begin))
        self._task.add_done_callback(lambda task: self._arrived.set())

    @property
    def status(self) -> int:
        """After the first `next`."""
        return 0 if self._exchange is None else self._exchange.status

    @property
    def headers(self) -> Mapping[str, str]:
        """After the first `next`; names in lower case."""
        return {} if self._exchange is None else self._exchange.headers

    async def next(self) -> bytes:
        """What has come since; b"" at the end. Of a status other than 200 all at once. Raises BrokenAnswer."""
        while not self._pieces:
            if self._fault is not None:
                raise self._fault
            if self._task.done():
                done = self._task.result()
                kept, done.kept = b"".join(done.kept), []
                return kept
            self._arrived.clear()
            await self._arrived.wait()
        found = b"".join(self._pieces)
        self._pieces.clear()
        if self._num_ahead > MAX_AHEAD and self._exchange is not None and self._exchange.transport is not None:
            self._exchange.transport.resume_reading()
        self._num_ahead = 0
        return found

    async def rest(self) -> bytes:
        """All that is still to come. Raises BrokenAnswer."""
        pieces = []
        while piece := await self.next():
            pieces.append(piece)
        return b"".join(pieces)

    def give_up(self, why: str) -> None:
        """Let `next` raise BrokenAnswer."""
        self._fault = BrokenAnswer(why)
        self._arrived.set()

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError, BrokenAnswer):
            await self._task

    def _begin(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def _take(self, body: bytes, now_s: float) -> None:
        self._pieces.append(body)
        self.heard_s = time.monotonic()
        before, self._num_ahead = self._num_ahead, self._num_ahead + len(body)
        transport = None if self._exchange is None else self._exchange.transport
        if before <= MAX_AHEAD < self._num_ahead and transport is not None:
            transport.pause_reading()
        self._arrived.set()


def run_in_loop(coroutine: Callable[[], object]) -> object:
    """Run an async function to its end, on uvloop where there is one: half the CPU per streamed token."""
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coroutine())  # type: ignore[arg-type]
