"""uvicorn as servers here use it: bounded heads, no signal handling, a quiet log. Does not know what is served."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from penstock.config.schema import ServerOptions
from penstock.config.values import ConfigError
from penstock.server.http_limits import BoundedHead

LAST_WORDS_S = 3.0  # for answers that are being written when the server stops


class Http(uvicorn.Server):
    """uvicorn without its signal handling: a first signal drains its owner, and HTTP goes on until that is done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http(app: ASGIApp, options: ServerOptions) -> Http:
    """A server that is not started. Raises ConfigError for a certificate that cannot be used."""
    http = uvicorn.Config(
        app,
        http=BoundedHead,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=options.root_path,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(LAST_WORDS_S),
    )
    try:
        http.load()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", "--ssl-certfile") from None
    return Http(http)


def server_url(options: ServerOptions, sock: socket.socket) -> str:
    """Where clients of this machine find it."""
    scheme = "https" if options.ssl_certfile else "http"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{host}:{sock.getsockname()[1]}{options.root_path}"
