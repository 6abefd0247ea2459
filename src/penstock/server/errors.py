"""What a client is told when something is wrong: one exception, one JSON shape, OpenAI's.

Knows HTTP status codes. Does not know requests, engines or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 2xx. `param` names the field at fault, `code` is for programs, `message` for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """`{"error": {message, type, param, code}}`."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        content = msgspec.json.encode(self.body)
        return Response(content, self.status, media_type="application/json", headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str, served: Sequence[str]) -> ApiError:
    message = f"the model {clipped(model)!r} does not exist; this server has {', '.join(served)}"
    return ApiError(404, message, param="model", code="model_not_found")


def body_too_large(max_body_bytes: int) -> ApiError:
    """Also closes the connection: the rest of the body is not wanted."""
    message = f"the request body is larger than {max_body_bytes} bytes"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


def queue_full(message: str, retry_after_s: float) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"retry-after": str(max(1, round(retry_after_s)))})


def unavailable(message: str, code: str, retry_after_s: float = 1.0) -> ApiError:
    return ApiError(503, message, code=code, headers={"retry-after": str(max(1, round(retry_after_s)))})


def clipped(text: str, max_chars: int = 120) -> str:
    """What a client sent, short enough to be told back."""
    return text if len(text) <= max_chars else text[:max_chars] + "..."
