"""Ports for servers that tests start and name before they listen."""

from __future__ import annotations

import os
import socket
from itertools import count

# Below what a kernel gives to outgoing connections, so that none of them takes a port before its server does. Workers
# that run tests side by side have a slice each.
FIRST, SLICE, NUM_SLICES = 12_000, 4_000, 5
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % NUM_SLICES
_numbers = count(os.getpid())


def free_port() -> int:
    """Nobody listens there, and this process gives it to nobody else for a long while."""
    for number in _numbers:
        port = FIRST + SLICE * _worker + number % SLICE
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable: numbers have no end")
