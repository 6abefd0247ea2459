"""What stands before every endpoint: request ids, API keys, and bodies of bounded size.

Pure ASGI, so that a stream passes through without another task. Knows headers and bytes; does not know what a request
asks for.
"""

from __future__ import annotations

import asyncio
import hmac
import uuid

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.errors import ApiError, body_too_large
from penstock.server.requests import valid_request_id

BODY_TIMEOUT_S = 60.0  # for a whole body to arrive
LINGER_S = 5.0  # how long a refused body is read and thrown away, so that the client gets to see the answer
# Everything else needs a key, where keys are set. Pages are files without data: what they show is behind a key.
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/version", "/metrics", "/favicon.ico"})


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


class Direct:
    """Outermost middleware: keeps the server's own `send` as `scope["state"]["send"]`.

    Only the head of a response interests the middleware in between; a stream sends its body around them, which saves
    five coroutine calls per token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["send"] = send
        try:
            await self.app(scope, receive, send)
        finally:
            del state["send"]  # it holds the scope: a circle that only a rare collection would free


class Gate:
    """ASGI middleware: checks the key and gives every request an id (`scope["state"]["request_id"]`).

    A valid X-Request-Id of the client is kept, otherwise one is made; every response carries it, unless the endpoint
    sets its own (an id that was in use gets a suffix).
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: tuple[str, ...] = (),
        open_paths: frozenset[str] = OPEN_PATHS,
        open_prefixes: tuple[str, ...] = (),
    ) -> None:
        self.app = app
        self.api_keys = tuple(key.encode() for key in api_keys)
        self.open_paths, self.open_prefixes = open_paths, open_prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id, key = "", b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                sent_id = value.decode("latin-1")
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
            elif name == b"x-api-key" and not key:
                key = value.strip()
        request_id = sent_id if valid_request_id(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                if not any(name == b"x-request-id" for name, _ in headers):
                    message["headers"] = [*headers, (b"x-request-id", request_id.encode())]
            await send(message)

        if self.api_keys and not self._open(scope) and not self._known(key):
            given = "the API key is wrong" if key else "an API key is needed"
            error = ApiError(
                401,
                f"{given}; send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send_with_id)
            return
        await self.app(scope, receive, send_with_id)

    def _open(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return path in self.open_paths or path.startswith(self.open_prefixes)

    def _known(self, key: bytes) -> bool:
        """Compares with every key, each in constant time, so that the time tells nothing."""
        known = False
        for own in self.api_keys:
            known |= hmac.compare_digest(own, key)
        return known


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is known to be too large, 408 when it does not arrive,
    ClientGone when the client leaves. Never holds more than `max_body_bytes` and one piece of 64 kB."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_body_bytes:
        raise body_too_large(max_body_bytes)
    pieces: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                num_bytes += len(piece)
                if num_bytes > max_body_bytes:
                    raise body_too_large(max_body_bytes)
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise ApiError(
            408, f"the request body did not arrive within {BODY_TIMEOUT_S:.0f} s", headers={"connection": "close"}
        ) from None


class RefusedBody:
    """Answers a request whose body is not wanted, then reads on for a moment and throws away what comes.

    Closing at once would reset the connection under a client that is still sending, and the answer would be lost.
    """

    def __init__(self, error: ApiError) -> None:
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self.error.response()
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
