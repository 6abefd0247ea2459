"""The port of a server. Apart from the server itself, whose packages take long to import: the port is taken before."""

from __future__ import annotations

import errno
import socket

from penstock.config.hardware import port_holder
from penstock.config.schema import ServerOptions
from penstock.config.values import ConfigError


def listening_socket(options: ServerOptions) -> socket.socket:
    """Take the port, before anything loads. Raises ConfigError: in use (names the holder), forbidden, no such host."""
    host, port = options.host, options.port
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            other = port + 1 if port < 65535 else 8000
            holder = port_holder(host, port) or "another program"
            message = (
                f"{port} is in use by {holder}; stop it, or take another: --port {other} (make serve PORT={other})"
            )
            raise ConfigError(message, "--port") from None
        if isinstance(error, PermissionError):
            raise ConfigError(f"this user may not listen on {port}; take one above 1023", "--port") from None
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}", "--host") from None
    sock.setblocking(False)
    return sock
