"""The router's HTTP side: calls in, the same calls out to an engine, its answer back as it comes.

A call whose engine is gone before the first byte went to the client is made again elsewhere; after that the stream ends
with a typed error, for no engine can be told from outside to go on where another one stopped. With engines for one
phase each it drives them by vLLM's proxy contract: P with one token, then D with P's `kv_transfer_params`.

Bodies go through unread but for what placing needs; whether they are right is the engines' to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from penstock import __version__
from penstock.cluster.dispatcher import Dispatcher
from penstock.cluster.router import Placed
from penstock.config.schema import ServerOptions
from penstock.server.answers import DONE, event
from penstock.server.app import Guarded, framed
from penstock.server.errors import ApiError, clipped, model_not_found, unavailable
from penstock.server.http_client import BrokenAnswer, OpenAnswer
from penstock.server.limits import read_body
from penstock.server.live_shapes import told_route
from penstock.server.requests import parse_object
from penstock.server.route_engines import RemoteEngine, RemoteEngines
from penstock.server.route_metrics import RouteMetrics
from penstock.server.route_prompts import Prompts
from penstock.server.shapes import Json

log = logging.getLogger("penstock.route")

MAX_TRIES = 3  # engines that one call may be sent to
ELSEWHERE = (429, 502, 503)  # statuses after which another engine may say something else
TOLD = ("content-type", "cache-control", "retry-after", "x-accel-buffering", "x-penstock-warning")  # headers passed on
CALLS = ("/v1/chat/completions", "/v1/completions")
MAX_ROUTES = 100
EXPLAIN_TIMEOUT_S = 5.0
_encode = msgspec.json.Encoder().encode


class RouterApp:
    """All endpoints. `drain` refuses new calls; `num_live` counts those that run."""

    def __init__(
        self,
        options: ServerOptions,
        dispatcher: Dispatcher,
        engines: RemoteEngines,
        prompts: Prompts,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options, self.dispatcher, self.engines, self.prompts, self.now = options, dispatcher, engines, prompts, now
        self.metrics = RouteMetrics(engines.all.values(), dispatcher)
        self.num_live = 0
        self.is_draining = False
        self._numbers = 0

    def app(self) -> Starlette:
        def route(path: str, handler: Callable[[Request], Any], *methods: str) -> Route:
            return Route(path, Guarded(handler), methods=list(methods))

        routes: list[BaseRoute] = [route(path, self._call, "POST") for path in CALLS]
        routes += [
            route("/v1/models", self._models, "GET"),
            route("/health", self._health, "GET"),
            route("/ping", self._health, "GET", "POST"),
            route("/version", self._version, "GET"),
            route("/metrics", self._metrics, "GET"),
            route("/routes/recent", self._routes, "GET"),
            route("/explain/{request_id}", self._explain, "GET"),
        ]
        return framed(routes, self.options)

    # ---- calls ----

    async def _call(self, request: Request) -> RoutedCall:
        if self.is_draining:
            raise unavailable("the router is shutting down", "draining")
        body = await read_body(request, self.options.max_body_bytes)
        asked = parse_object(body)
        model = asked.get("model")
        models = self.dispatcher.models()
        if models and isinstance(model, str) and model and model not in models:
            raise model_not_found(model, models)
        shunned = self.dispatcher.without(model if isinstance(model, str) and model else None)
        token_ids = await self.prompts.token_ids(asked)
        headers = {"x_request_id": request.scope["state"]["request_id"]}
        if self.engines.options.engine_api_key is None:
            key = request.headers.get("authorization") or request.headers.get("x-api-key")
            if key is not None:
                headers["authorization"] = key if key[:7].lower() == "bearer " else f"Bearer {key}"
        return RoutedCall(self, request.url.path, body, asked, token_ids, shunned, headers)

    def free_id(self, request_id: str) -> str:
        """The same, if no running call has it."""
        if not self.dispatcher.is_live(request_id):
            return request_id
        self._numbers += 1
        return f"{request_id}-r{self._numbers}"

    # ---- the small ones ----

    async def _models(self, request: Request) -> Response:
        names = self.dispatcher.models()
        if not names:
            raise unavailable("no engine is there yet", "no_engine")
        lengths = dict.fromkeys(names, 0)
        for facts in self.dispatcher.facts.values():
            for name in facts.models:
                lengths[name] = max(lengths[name], facts.max_model_len)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "penstock", "max_model_len": length or None}
            for name, length in lengths.items()
        ]
        return _json({"object": "list", "data": data})

    async def _health(self, request: Request) -> Response:
        engines = {
            name: {"role": engine.address.role, "is_up": engine.is_up, **({"reason": engine.why} if engine.why else {})}
            for name, engine in self.engines.all.items()
        }
        is_well = self.dispatcher.can_serve and not self.is_draining
        status = "ok" if is_well else "draining" if self.is_draining else "no engine"
        return _json({"status": status, "engines": engines}, 200 if is_well else 503)

    async def _version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def _metrics(self, request: Request) -> Response:
        text, content_type = self.metrics.render()
        return Response(text, headers={"content-type": content_type})

    async def _routes(self, request: Request) -> Response:
        offset_s = time.time() - self.now()
        recent = self.dispatcher.decisions.recent(MAX_ROUTES)
        return _json({"routes": [told_route(route, offset_s) for route in recent]})

    async def _explain(self, request: Request) -> Response:
        """Why it went where it did, and what its engine says of it."""
        request_id = request.path_params["request_id"]
        route = self.dispatcher.decisions.explain(request_id)
        if route is None:
            message = f"no running or recently finished request has the id {clipped(request_id)!r}"
            raise ApiError(404, message, code="request_not_found")
        told: Json = {"request_id": request_id}
        engine = self.engines.all[route["engine"]]
        with contextlib.suppress(BrokenAnswer, msgspec.MsgspecError):
            status, body = await engine.http.get(f"/explain/{request_id}", EXPLAIN_TIMEOUT_S)
            if status == 200:
                told = msgspec.json.decode(body)
        return _json({**told, "engine": engine.name, "route": told_route(route, time.time() - self.now())})


class RoutedCall:
    """One call on its way, as an ASGI application. Nothing goes to the client before an engine has said something."""

    def __init__(
        self,
        router: RouterApp,
        path: str,
        body: bytes,
        asked: Json,
        token_ids: list[int],
        shunned: set[str],
        headers: dict[str, str],
    ) -> None:
        self.router, self.path, self.body, self.asked = router, path, body, asked
        self.token_ids, self.shunned, self.headers = token_ids, shunned, headers
        self.request_id = router.free_id(headers["x_request_id"])
        self.headers["x_request_id"] = self.request_id
        self.num_output = 0
        self.outcome = ""  # once it is known
        self.is_handed_over = False  # a prefill engine has done its part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(scope, receive, send))

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.outcome = self.outcome or "abort"  # a complete answer also ends with it
            work.cancel()

        watcher = asyncio.ensure_future(watch())
        self.router.num_live += 1
        try:
            await work
        except asyncio.CancelledError:
            if not self.outcome:
                raise
        finally:
            watcher.cancel()
            work.cancel()
            self.router.num_live -= 1
            self.outcome = self.outcome or "error"
            self.router.dispatcher.ended(self.request_id, self.num_output, self.outcome, self.router.now())
            self.router.metrics.ended(self.outcome)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ApiError | Whole = unavailable("no engine is there that could take this", "no_engine")
        for _ in range(MAX_TRIES):
            placed = self._placed()
            if placed is None:
                break
            try:
                if placed.prefill_at and not self.is_handed_over:
                    await self._prefill(placed)
                await self._answered(self.router.engines.all[placed.engine], send, scope["state"]["send"])
                return
            except _Elsewhere as error:
                self.shunned.add(placed.engine)
                self.router.metrics.retried(placed.engine)
                answer = error.answer
            except _Refused as error:
                answer = error.answer
                break
        if isinstance(answer, ApiError):
            await answer.response()(scope, receive, send)
        else:
            await answer.send(send)

    def _placed(self) -> Placed | None:
        router = self.router
        began_s = router.now()
        most = [self.asked.get(name) for name in ("max_completion_tokens", "max_tokens")]
        limit = next((value for value in most if type(value) is int and value > 0), None)
        placed = router.dispatcher.place(self.request_id, self.token_ids, limit, self.shunned, began_s)
        if placed is not None:
            router.metrics.placed(placed, router.now() - began_s)
        return placed

    # ---- the prompt, where engines have one phase each ----

    async def _prefill(self, placed: Placed) -> None:
        """Have it computed by the first that does; by none: then the decode engine computes it. Raises _Refused."""
        body = prefill_body(self.asked)
        for name in placed.prefill_at:
            engine = self.router.engines.all[name]
            try:
                async with engine.ask(self.path, body, self.headers) as answer:
                    told = await answer.rest()
            except BrokenAnswer as error:
                self.router.engines.lost(name, str(error))
                continue
            if answer.status in ELSEWHERE or answer.status >= 500:
                log.warning("prefill engine %s: status %d", name, answer.status)
                continue
            if answer.status != 200:
                raise _Refused(Whole.of(answer, told, name))
            params = msgspec.json.decode(told).get("kv_transfer_params")
            if not params:
                log.warning("prefill engine %s gives no kv_transfer_params: is it one?", name)
                continue
            self.body = _encode({**self.asked, "kv_transfer_params": params})
            self.is_handed_over = True
            return

    # ---- the answer ----

    async def _answered(self, engine: RemoteEngine, send: Send, send_body: Send) -> None:
        """Pass an engine's answer on. Raises _Elsewhere while nothing has been passed on."""
        async with engine.ask(self.path, self.body, self.headers) as answer:
            try:
                first = await answer.next()
                is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
                if is_stream:
                    self.router.dispatcher.began(self.request_id, self.router.now())
                else:
                    first += await answer.rest()
            except BrokenAnswer as error:
                self.router.engines.lost(engine.name, str(error))
                message = f"engine {engine.name} broke off: {error}"
                raise _Elsewhere(ApiError(502, message, code="engine_lost")) from None
            if answer.status in ELSEWHERE:
                raise _Elsewhere(Whole.of(answer, first, engine.name))
            if is_stream:
                await self._streamed(engine, answer, first, send, send_body)
                return
            self.outcome = "stop" if answer.status == 200 else "error"
            if answer.status == 200:
                self._count(first)
            await Whole.of(answer, first, engine.name).send(send)

    async def _streamed(
        self, engine: RemoteEngine, answer: OpenAnswer, first: bytes, send: Send, send_body: Send
    ) -> None:
        head = _head(answer, engine.name)
        await send({"type": "http.response.start", "status": answer.status, "headers": head})
        piece = first
        while piece:
            self.num_output += piece.count(b"data: {")
            await send_body({"type": "http.response.body", "body": piece, "more_body": True})
            try:
                piece = await answer.next()
            except BrokenAnswer as error:
                self.router.engines.lost(engine.name, str(error))
                self.outcome = "error"
                message = f"engine {engine.name} ended while it answered; its answer cannot be continued elsewhere"
                told = event(ApiError(502, message, code="engine_lost").body) + DONE
                await send_body({"type": "http.response.body", "body": told, "more_body": False})
                return
        self.outcome = "stop"
        await send_body({"type": "http.response.body", "body": b"", "more_body": False})

    def _count(self, body: bytes) -> None:
        with contextlib.suppress(msgspec.MsgspecError, KeyError, TypeError):
            self.num_output = int(msgspec.json.decode(body)["usage"]["completion_tokens"])


class Whole:
    """An answer in one piece as an engine gave it."""

    def __init__(self, status: int, head: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status, self.head, self.body = status, head, body

    @staticmethod
    def of(answer: OpenAnswer, body: bytes, engine: str) -> Whole:
        return Whole(answer.status, [*_head(answer, engine), (b"content-length", str(len(body)).encode())], body)

    async def send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self.head})
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


class _Elsewhere(Exception):
    """This engine did not do it and another one may; if none does, `answer` is what the client gets."""

    def __init__(self, answer: ApiError | Whole) -> None:
        super().__init__()
        self.answer = answer


class _Refused(_Elsewhere):
    """No engine would do it."""


def prefill_body(asked: Json) -> bytes:
    """The call that a prefill engine gets: one token, not streamed, and its blocks kept for somebody else."""
    body = {name: value for name, value in asked.items() if name not in ("stream_options", "min_tokens")}
    body |= {"stream": False, "max_tokens": 1}
    if "max_completion_tokens" in body:
        body["max_completion_tokens"] = 1
    body["kv_transfer_params"] = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    return _encode(body)


def _head(answer: OpenAnswer, engine: str) -> list[tuple[bytes, bytes]]:
    found = [(name.encode(), answer.headers[name].encode("latin-1")) for name in TOLD if name in answer.headers]
    request_id = answer.headers.get("x-request-id")
    if request_id is not None:
        found.append((b"x-request-id", request_id.encode("latin-1")))
    return [*found, (b"x-penstock-engine", engine.encode("latin-1", "replace"))]


def _json(data: Json, status: int = 200) -> Response:
    return Response(_encode(data), status, media_type="application/json")
