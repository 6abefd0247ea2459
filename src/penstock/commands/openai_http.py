"""A small client of OpenAI-compatible servers for the terminal: JSON, server-sent events, clear errors.

Standard library only, so that `penstock chat` works wherever Python does, also against other servers. Knows HTTP and
JSON shapes; does not know terminals.
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.parse
from collections.abc import Generator, Iterator
from typing import Any


class ServerError(Exception):
    """The server said no, or is not there; one line for people. `status` is 0 without an answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class OpenAIServer:
    """One server, by URL (with or without /v1). Every call opens a connection and closes it."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 300.0) -> None:
        if "://" not in url:
            url = "http://" + url
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"{url} is not an address such as http://127.0.0.1:8000")
        try:
            port = parts.port
        except ValueError:
            raise ServerError(f"{url} has no valid port") from None
        self.host, self.port = parts.hostname, port
        self.secure = parts.scheme == "https"
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self.timeout_s = timeout_s
        self._headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        """The JSON (or, if it is none, the text) at a path. Raises ServerError."""
        with self._send("GET", path, None) as answer:
            text = answer.read().decode("utf-8", "replace")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a JSON body. Raises ServerError."""
        with self._send("POST", path, body) as answer:
            return json.loads(answer.read())

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer, as they come. Raises ServerError, also for an error inside the stream."""
        with self._send("POST", path, {**body, "stream": True}) as answer:
            for line in answer.lines():
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(_message(event), 500)
                yield event
        raise ServerError("the server closed the stream before its end")

    def model(self) -> str:
        """Name of the first model. Raises ServerError."""
        models = self.get("/v1/models").get("data") or []
        if not models:
            raise ServerError(f"the server at {self.url} has no model")
        return str(models[0]["id"])

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> _Answer:
        connection: http.client.HTTPConnection
        if self.secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self.prefix + path, payload, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"no answer from {self.url} ({reason}); start a server with: penstock serve") from None
        if response.status >= 300:
            text = response.read(1 << 20).decode("utf-8", "replace")
            connection.close()
            raise ServerError(_refusal(response.status, text, self.url), response.status)
        return _Answer(connection, response)


class _Answer:
    """A response that closes its connection, and turns a broken one into a ServerError."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def read(self) -> bytes:
        try:
            return self._response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"the connection broke: {error}") from None

    def lines(self) -> Iterator[bytes]:
        while True:
            try:
                line = self._response.readline()
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"the connection broke: {error}") from None
            if not line:
                return
            yield line.rstrip(b"\r\n")


def _message(event: dict[str, Any]) -> str:
    error = event["error"]
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _refusal(status: int, text: str, url: str) -> str:
    try:
        said = _message(json.loads(text))
    except (ValueError, KeyError, TypeError):
        said = text.strip()[:200] or http.client.responses.get(status, "")
    if status == 401:
        return f"{said} (give the key with --api-key or PENSTOCK_API_KEY)"
    return f"{url} answered {status}: {said}"
