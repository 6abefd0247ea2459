"""The live page's server side: an observer of the front end, a tick every half second, and a few routes.

    GET /                     the page; its files lie under /page/
    GET /live                 server-sent events: hello, then a snapshot each tick, bye when the server drains
    GET /live/snapshot        the newest snapshot as one document; ?hello=1 gives the hello
    GET /explain/{request_id} where one request's time went, and why it went to its engine
    GET /routes/recent        the last decisions of the router

One snapshot is built and encoded per tick for all listeners, and none while nobody listens: then only the series ring
runs. The engine is asked for request records and the block map (`Watch`) only while somebody listens. Knows the
engine's messages and starlette. Knows no prompt text, and not who may call: the app's middleware checks keys; `/` and
`/page/` hold no data and may stay open (`OPEN_PREFIXES`).

Everything here runs in the server's event loop; nothing may be called from another thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import PathLike, StaticFiles
from starlette.types import Scope

from penstock import __version__
from penstock.config.schema import Config
from penstock.core.request import SamplingParams
from penstock.engine.messages import (
    Explain,
    Failed,
    Fatal,
    FromEngine,
    Progress,
    Ready,
    Record,
    Report,
    RequestRecord,
    ToEngine,
    Watch,
)
from penstock.server import live_shapes
from penstock.server.errors import ApiError, clipped, unavailable
from penstock.server.live_cluster import ClusterSeries, Json
from penstock.server.live_series import INTERVAL_S, Series, Totals
from penstock.server.live_shapes import RequestRow, Track

log = logging.getLogger("penstock.live")

PAGES = Path(__file__).parent / "pages"
OPEN_PREFIXES = ("/page/",)  # files without data: no key needed, as for "/" itself
PAGE_HEADERS = {
    # No inline script or style, nothing from elsewhere; icons are data: URLs.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask each time; the ETag makes that cheap
}
STREAM_HEADERS = {"cache-control": "no-store, no-transform", "x-accel-buffering": "no"}

KEEP_ALIVE_S = 15.0
MAX_BEHIND = 4  # snapshots a listener may lag before it is dropped
MAX_LIVE = 200  # request rows in a snapshot
MAX_FINISHED = 30
MAX_EXPLAINED = 1000  # finished requests that /explain remembers
WATCH_S = 3.0  # a Watch lasts this long and is renewed at half of it
MAX_ROUTES = 100  # decisions that /routes/recent tells
MAX_SHOWN_ROUTES = 7  # of them in a snapshot
ROUTES_WINDOW_S = 10.0
ANSWER_S = 2.0  # wait for the engine's word at most this long


class Routes(Protocol):
    """What a server knows of where its requests went; nothing where there is one engine."""

    def explain_route(self, request_id: str) -> Json | None: ...

    def engine_of(self, request_id: str) -> str: ...

    def recent_routes(self, number: int) -> list[Json]: ...

    @property
    def num_routes(self) -> int: ...


class PageFiles(StaticFiles):
    """The page's files, with the headers that keep it from ever running or loading anything else."""

    def file_response(self, full_path: PathLike, stat_result: Any, scope: Scope, status_code: int = 200) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(PAGE_HEADERS)
        return response


class Listener:
    """One open /live: a bounded queue of encoded events; None ends the stream."""

    __slots__ = ("queue",)

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_BEHIND)

    def end(self) -> None:
        """Let the stream end at its next turn; what was not sent yet is forgotten."""
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait(None)


class Live:
    """Observer of the front end, and owner of the routes.

    `send` takes a message to the engine (Watch, Explain). `clock` is the engine's clock, `wall` seconds since 1970.
    `start()` and `stop()` belong into the app's lifespan; `stop()` says bye to all listeners, so that the HTTP server
    can close its connections.
    """

    def __init__(
        self,
        config: Config,
        model_id: str,
        send: Callable[[ToEngine], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        routes: Routes | None = None,
    ) -> None:
        self.model_id = model_id
        self.seq = 0
        self.ready: Ready | None = None
        self.report: Report | None = None
        self.stage = "starting"
        self._config = live_shapes.config_rows(config)
        self._send = send
        self._clock, self._wall = clock, wall
        self._started_s = clock()
        self._routes = routes
        self.series = Series(self._started_s)
        self.cluster = ClusterSeries()
        self._num_routes = Totals(ROUTES_WINDOW_S)
        self._offset_s = wall() - clock()
        self._running: dict[str, Track] = {}
        self._finished: OrderedDict[str, Track] = OrderedDict()
        self._listeners: set[Listener] = set()
        self._watched_until_s = 0.0
        self._reported = asyncio.Event()
        self._waiting: dict[str, list[asyncio.Future[RequestRecord | None]]] = {}
        self._newest: bytes | None = None
        self._encoder = msgspec.json.Encoder()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    # ---- observer ----

    def received(self, request_id: str, num_prompt_tokens: int, params: SamplingParams, now: float) -> None:
        """A request was accepted and sent to the engine."""
        engine = "" if self._routes is None else self._routes.engine_of(request_id)
        self._running[request_id] = Track(request_id, num_prompt_tokens, now, engine=engine)

    def emitted(self, request_id: str, num_new_tokens: int, now: float) -> None:
        """Tokens of one step left for the client. A step of k tokens counts as k gaps of a k-th each."""
        if not num_new_tokens:
            return
        series = self.series
        series.num_generated += num_new_tokens
        track = self._running.get(request_id)
        if track is None:
            return
        if track.last_s is None:
            track.first_s = now
            series.first_tokens.new.append(now - track.received_s)
        elif num_new_tokens == 1:
            series.gaps.new.append(now - track.last_s)
        else:
            series.gaps.new.extend([(now - track.last_s) / num_new_tokens] * num_new_tokens)
        track.last_s = now
        track.num_tokens += num_new_tokens

    def finished(self, request_id: str, record: RequestRecord | None, finish_reason: str, now: float) -> None:
        """A request ended."""
        track = self._running.pop(request_id, None)
        if track is None:
            return
        track.finish_s, track.finish_reason = now, finish_reason
        track.record = record or track.record
        self._finished[request_id] = track
        if len(self._finished) > MAX_EXPLAINED:
            self._finished.popitem(last=False)
        self._answer(request_id, track.record)

    def rejected(self, reason: str, now: float) -> None:
        """A request was refused; the page shows only requests that the engine saw."""

    def message(self, message: FromEngine, now: float) -> None:
        """Anything the engine says."""
        kind = type(message)
        if kind is Report:
            assert isinstance(message, Report)
            self.report = message
            for record in message.requests:
                track = self._running.get(record.request_id)
                if track is not None:
                    track.record = record
            self._reported.set()
        elif isinstance(message, Record):
            self._answer(message.record.request_id, message.record)
        elif isinstance(message, Failed):
            self._answer(message.request_id, None)
        elif isinstance(message, Ready):
            self.ready, self.report = message, None
            self._end_all()  # what they know of the engine is not true any more; they come back for a new hello
        elif isinstance(message, Progress):
            share = f" {100 * message.done // message.total} %" if message.total else ""
            self.stage = message.stage + share
        elif isinstance(message, Fatal):
            self.ready, self.stage = None, message.message
            self._end_all()

    def _end_all(self) -> None:
        for listener in self._listeners:
            listener.end()
        self._listeners.clear()

    def _answer(self, request_id: str, record: RequestRecord | None) -> None:
        for future in self._waiting.pop(request_id, ()):
            if not future.done():
                future.set_result(record)

    # ---- tick ----

    def start(self) -> None:
        """Begin to tick, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Say bye to all listeners and stop ticking. Later listeners are refused."""
        self._closed = True
        bye = b"event: bye\ndata: {}\n\n"
        for listener in list(self._listeners):
            listener.end()
            listener.queue.get_nowait()
            listener.queue.put_nowait(bye)
            listener.queue.put_nowait(None)
        self._listeners.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + INTERVAL_S, loop.time())  # after a stall: go on from now, never catch up in a burst
            await asyncio.sleep(due - loop.time())
            try:
                self.tick()
            except Exception:  # the page must never take the server down
                log.exception("the live page's tick failed")

    def tick(self) -> None:
        """Close one interval of the series, and send a snapshot to whoever listens."""
        now = self._clock()
        offset_s = self._wall() - now
        if abs(offset_s - self._offset_s) > 0.1:  # the wall clock was set; smaller steps would make rows jitter
            self._offset_s = offset_s
        self.seq += 1
        self.cluster.tick(now, self.report)
        if self._routes is not None:
            self._num_routes.tick(now, (self._routes.num_routes,))
        self.series.tick(now, now + self._offset_s, self.report)
        self._newest = None
        if not self._listeners or self.ready is None:
            return
        self._watch(now)
        event = self._event("snapshot", self._snapshot(now, self.seq % 2 == 0))
        for listener in list(self._listeners):
            try:
                listener.queue.put_nowait(event)
            except asyncio.QueueFull:
                self._listeners.discard(listener)
                listener.end()

    def _watch(self, now: float) -> None:
        if now >= self._watched_until_s - WATCH_S / 2:
            self._watched_until_s = now + WATCH_S
            self._send(Watch(until_s=self._watched_until_s, interval_s=INTERVAL_S))

    def _event(self, name: str, data: Json) -> bytes:
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (self.seq, name.encode(), self._encoder.encode(data))

    def _row(self, now: float) -> dict[str, float | int | None]:
        return self.series.row or self.series.tick(now, now + self._offset_s, self.report)

    def _hello(self) -> Json:
        assert self.ready is not None
        return live_shapes.hello(__version__, self.model_id, self._config, self.ready, self.series, INTERVAL_S)

    def _snapshot(self, now: float, with_requests: bool) -> Json:
        assert self.ready is not None
        uptime_s = now - self._started_s
        row = self._row(now)
        shaped = live_shapes.snapshot(self.seq, uptime_s, self.ready, self.report, self.series, self.cluster, row)
        if self._routes is not None and self.ready.engines:
            shaped["router"] = self._router()
        if with_requests:
            shaped["requests"] = self._request_rows()
        return shaped

    def _router(self) -> Json:
        assert self._routes is not None
        shown = [
            live_shapes.told_route(route, self._offset_s) for route in self._routes.recent_routes(MAX_SHOWN_ROUTES)
        ]
        return {"decisions_per_s": self._num_routes.rate(ROUTES_WINDOW_S, 0), "decisions": shown}

    def _request_rows(self) -> list[RequestRow | msgspec.Raw]:
        """Live ones, those with tokens or a place first, then the last finished, newest first."""
        wall = self._offset_s
        tracks = self._running.values()  # in order of arrival
        waiting: list[Track] = []
        placed: list[Track] = []
        for track in tracks:
            is_waiting = track.first_s is None if track.record is None else track.record.state == "waiting"
            (waiting if is_waiting else placed).append(track)
        live = placed[:MAX_LIVE]
        live += waiting[: MAX_LIVE - len(live)]
        rows: list[RequestRow | msgspec.Raw] = [live_shapes.request_row(track, wall) for track in live]
        for track in islice(reversed(self._finished.values()), MAX_FINISHED):
            if track.row is None:  # it will not change any more
                track.row = msgspec.Raw(self._encoder.encode(live_shapes.request_row(track, wall)))
            rows.append(track.row)
        return rows

    # ---- routes ----

    def routes(self) -> list[BaseRoute]:
        """For the app's route table. Paths are relative to the app; the page itself uses relative addresses only."""
        return [
            Route("/", self._page, methods=["GET"]),
            Mount("/page", PageFiles(directory=PAGES)),
            Route("/live", self._stream, methods=["GET"]),
            Route("/live/snapshot", self._document, methods=["GET"]),
            Route("/explain/{request_id:path}", self._explain, methods=["GET"]),
            Route("/routes/recent", self._recent_routes, methods=["GET"]),
        ]

    async def _page(self, request: HttpRequest) -> Response:
        return FileResponse(PAGES / "index.html", headers=PAGE_HEADERS)

    def _not_ready(self) -> Response | None:
        if self._closed:
            return unavailable("the server is shutting down", "shutting_down").response()
        if self.ready is None:
            return unavailable(f"the engine is not ready: {self.stage}", "loading").response()
        return None

    async def _stream(self, request: HttpRequest) -> Response:
        refused = self._not_ready()
        if refused is not None:
            return refused
        now = self._clock()
        self._watch(now)
        self._row(now)
        first = self._event("hello", self._hello()) + self._event("snapshot", self._snapshot(now, True))
        listener = Listener()
        self._listeners.add(listener)
        return StreamingResponse(self._events(listener, first), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def _events(self, listener: Listener, first: bytes) -> AsyncIterator[bytes]:
        try:
            yield first
            while True:
                try:
                    event = await asyncio.wait_for(listener.queue.get(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield b": keep-alive\n\n"
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._listeners.discard(listener)

    async def _document(self, request: HttpRequest) -> Response:
        refused = self._not_ready()
        if refused is not None:
            return refused
        if request.query_params.get("hello"):
            self._row(self._clock())
            return self._json(self._hello())
        if not self._listeners:  # nobody asked the engine for records yet: ask, and wait for its next report
            self._reported.clear()
            self._watch(self._clock())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reported.wait(), ANSWER_S)
        if self._newest is None:
            self._newest = self._encoder.encode(self._snapshot(self._clock(), True))
        return Response(self._newest, media_type="application/json", headers={"cache-control": "no-store"})

    async def _explain(self, request: HttpRequest) -> Response:
        asked = request.path_params["request_id"]
        track = self._find(asked)
        if track is None:
            message = f"no running or recently finished request has the id {clipped(asked)!r}"
            return ApiError(404, message, code="request_not_found").response()
        if track.finish_s is None and self.ready is not None:
            record = await self._ask(track.request_id)
            if record is not None and track.finish_s is None:
                track.record = record
        told = live_shapes.explain(track, self._clock())
        route = None if self._routes is None else self._routes.explain_route(track.request_id)
        if route is not None:
            told["route"] = live_shapes.told_route(route, self._offset_s)
        return self._json(told)

    async def _recent_routes(self, request: HttpRequest) -> Response:
        routes = [] if self._routes is None else self._routes.recent_routes(MAX_ROUTES)
        return self._json({"routes": [live_shapes.told_route(route, self._offset_s) for route in routes]})

    def _find(self, asked: str) -> Track | None:
        """By the engine's id, or by what the client knows: the id it chose or was told. Then the first sample."""
        plain = asked.removeprefix("chatcmpl-").removeprefix("cmpl-")
        for request_id in (asked, plain, f"{plain}.0", f"{plain}-0", f"{plain}-0.0"):
            track = self._running.get(request_id) or self._finished.get(request_id)
            if track is not None:
                return track
        return None

    async def _ask(self, request_id: str) -> RequestRecord | None:
        """The engine's record of a live request; None if it knows none or does not answer in time."""
        future: asyncio.Future[RequestRecord | None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(request_id, [])
        waiting.append(future)
        if len(waiting) == 1:
            self._send(Explain(request_id))
        try:
            return await asyncio.wait_for(future, ANSWER_S)
        except TimeoutError:
            self._waiting.pop(request_id, None)
            return None

    def _json(self, data: Json) -> Response:
        headers = {"cache-control": "no-store"}
        return Response(self._encoder.encode(data), media_type="application/json", headers=headers)
