"""The routes of a server and what surrounds them: CORS, keys and ids, errors in OpenAI's shape, the small endpoints.

`create_app` gives an ASGI application over a ServerState; nothing starts and nothing is loaded here. Does not know the
engine's process, signals or ports (serve.py).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock import __version__
from penstock.config.schema import ServerOptions
from penstock.engine.tokenizer import TokenizerError
from penstock.server.chat import Conversation
from penstock.server.errors import ApiError, bad_request, model_not_found
from penstock.server.limits import OPEN_PATHS, ClientGone, Direct, Gate, RefusedBody, read_body
from penstock.server.openai import check_model, endpoint, prepare_chat, prepare_completion
from penstock.server.requests import read_request, warn_unknown
from penstock.server.schema import DetokenizeRequest, TokenizeRequest
from penstock.server.shapes import Json
from penstock.server.state import ServerState

log = logging.getLogger("penstock.server")

Handler = Callable[[Request], Awaitable[ASGIApp]]
EXPOSED_HEADERS = ("x-request-id", "x-penstock-warning", "retry-after")


class Guarded:
    """An endpoint as an ASGI application: whatever it raises becomes an answer in OpenAI's shape, and stays its own."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp
        try:
            answer = await self.handler(Request(scope, receive))
        except ClientGone:
            answer = Response(status_code=499)  # nobody reads it
        except ApiError as error:
            answer = RefusedBody(error) if error.status in (408, 413) else error.response()
        except Exception:
            request_id = scope["state"]["request_id"]
            log.exception("request %s failed", request_id)
            message = f"the server made a mistake; its log has more under request id {request_id}"
            answer = ApiError(500, message, code="internal_error").response()
        await answer(scope, receive, send)


def create_app(
    state: ServerState,
    *,
    extra_routes: Sequence[BaseRoute] = (),
    open_prefixes: Sequence[str] = (),
    render_metrics: Callable[[], tuple[bytes, str]] | None = None,
) -> Starlette:
    """The application. `extra_routes` (the page) come after ours; paths that begin with one of `open_prefixes` need no
    key. `render_metrics` gives the text and the content type of /metrics."""
    options = state.options

    def route(path: str, handler: Handler, *methods: str) -> Route:
        return Route(path, Guarded(handler), methods=list(methods))

    small = SmallEndpoints(state)
    routes: list[BaseRoute] = [
        route("/v1/chat/completions", endpoint(state, prepare_chat), "POST"),
        route("/v1/completions", endpoint(state, prepare_completion), "POST"),
        route("/v1/models", small.models, "GET"),
        route("/v1/models/{name:path}", small.model, "GET"),
        route("/tokenize", small.tokenize, "POST"),
        route("/detokenize", small.detokenize, "POST"),
        route("/health", small.health, "GET"),
        route("/ping", small.health, "GET", "POST"),
        route("/version", small.version, "GET"),
        route("/load", small.load, "GET"),
        route("/reset_prefix_cache", small.reset_prefix_cache, "POST"),
    ]
    if render_metrics is not None:

        async def metrics(request: Request) -> Response:
            text, content_type = render_metrics()
            return Response(text, headers={"content-type": content_type})

        routes.append(route("/metrics", metrics, "GET"))
    return framed([*routes, *extra_routes], options, open_prefixes)


def framed(routes: Sequence[BaseRoute], options: ServerOptions, open_prefixes: Sequence[str] = ()) -> Starlette:
    """Routes with all that stands before them: CORS, keys and ids, refusals in OpenAI's shape."""
    app = Starlette(
        routes=list(routes),
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
        middleware=[
            Middleware(Direct),
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.allowed_origins),
                allow_credentials=options.allow_credentials,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=list(EXPOSED_HEADERS),
            ),
            Middleware(Gate, api_keys=options.api_key, open_paths=OPEN_PATHS, open_prefixes=tuple(open_prefixes)),
        ],
    )
    app.router.redirect_slashes = False
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own refusals: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        told = ApiError(404, f"there is nothing at {request.url.path}", code="not_found")
    elif error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message = f"{request.url.path} does not take {request.method}; it takes {allowed}"
        told = ApiError(405, message, code="method_not_allowed", headers={"allow": allowed})
    else:
        told = ApiError(error.status_code, error.detail)
    return told.response()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _json(data: Json, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status, headers=headers, media_type="application/json")


class SmallEndpoints:
    """Everything that needs no engine's tokens."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    def _card(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self.state.created,
            "owned_by": "penstock",
            "root": self.state.served.root,
            "parent": None,
            "max_model_len": self.state.front.max_model_len,
        }

    def _check_loaded(self) -> None:
        """What only looks at the model is answered as soon as that is known, also while the server drains."""
        if self.state.phase not in ("ready", "draining") or self.state.front.ready is None:
            self.state.check_open(0)

    async def models(self, request: Request) -> Response:
        self._check_loaded()
        return _json({"object": "list", "data": [self._card(name) for name in self.state.served.names]})

    async def model(self, request: Request) -> Response:
        self._check_loaded()
        name = request.path_params["name"]
        if name not in self.state.served.names:
            raise model_not_found(name, self.state.served.names)
        return _json(self._card(name))

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, self.state.options.max_body_bytes)
        self._check_loaded()
        asked, unknown = await self.state.run(len(body), lambda: read_request(body, TokenizeRequest))
        check_model(self.state, asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_request("either prompt or messages is required, and not both", "prompt")
        text, adds = asked.prompt, asked.add_special_tokens is not False
        if asked.messages is not None:
            adds = bool(asked.add_special_tokens)
            text = await self.state.render(
                Conversation(
                    asked.messages,
                    tools=asked.tools,
                    add_generation_prompt=asked.add_generation_prompt,
                    continue_final_message=asked.continue_final_message,
                    chat_template=asked.chat_template,
                    chat_template_kwargs=asked.chat_template_kwargs,
                )
            )
        assert text is not None
        [token_ids] = await self.state.encode([text], adds)
        tokenizer = self.state.served.tokenizer
        names = [tokenizer.id_to_token(token_id) for token_id in token_ids] if asked.return_token_strs else None
        limit = self.state.front.max_model_len
        body_out = {"count": len(token_ids), "max_model_len": limit, "tokens": token_ids, "token_strs": names}
        return _json(body_out, _warning(unknown))

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, self.state.options.max_body_bytes)
        self._check_loaded()
        asked, unknown = await self.state.run(len(body), lambda: read_request(body, DetokenizeRequest))
        check_model(self.state, asked.model)
        limit = self.state.served.vocab_size
        wrong = next((token_id for token_id in asked.tokens if token_id >= limit), None)
        if wrong is not None:
            message = f"token id {wrong} is not in the vocabulary of {limit}"
            raise bad_request(message, "tokens", "invalid_token_id")
        try:
            decode = self.state.served.tokenizer.decode
            text = await self.state.run(len(body), lambda: decode(asked.tokens, skip_special_tokens=False))
        except TokenizerError as error:
            raise bad_request(str(error), "tokens") from None
        return _json({"prompt": text}, _warning(unknown))

    async def health(self, request: Request) -> Response:
        status, body = self.state.health()
        return _json(body, {"retry-after": "1"} if status == 503 else None, status)

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def load(self, request: Request) -> Response:
        return _json({"server_load": self.state.num_calls})

    async def reset_prefix_cache(self, request: Request) -> Response:
        self.state.check_open(0)
        self.state.reset_prefix_cache()
        return _json({"status": "ok"})


def _warning(unknown: list[str]) -> dict[str, str] | None:
    text = warn_unknown(unknown)
    return None if text is None else {"x-penstock-warning": text}
