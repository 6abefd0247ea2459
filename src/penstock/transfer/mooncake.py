"""The Mooncake link: its Transfer Engine writes over RDMA or TCP, without a metadata server (P2PHANDSHAKE).

An engine for each end of each connection: it holds one registration and ends with it. It has threads of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from penstock.config.hardware import has_rdma
from penstock.transfer import onesided
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.onesided import MAX_CONNECTIONS, OneSidedOutgoing, Staging
from penstock.transfer.ring import RingIncoming

__all__ = ["MAX_CONNECTIONS", "dial", "incoming", "listen"]

DONE, PENDING = 1, 0


def listen(address: str) -> tuple[socket.socket, str]:
    """As `tcp.listen`, for "mooncake://host:port". Raises LinkError where the library is not installed."""
    load()
    return onesided.listen("mooncake", address)


def dial(address: str, identity: Identity) -> OneSidedOutgoing:
    """Raises LinkError, LinkRefused, OSError."""
    return onesided.dial(Mooncake(), address, identity)


def incoming(sock: socket.socket, ring_bytes: int) -> RingIncoming:
    """Raises LinkError, OSError."""
    return onesided.incoming(Mooncake(), sock, ring_bytes)


def load() -> Any:
    """The library's engine. Raises LinkError with what is to be installed."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # before it is loaded; else it tells each of its steps
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        reason = (
            "the Mooncake link needs an extra: pip install 'penstock[mooncake-cpu]', or 'penstock[mooncake]' on a "
            f"machine with CUDA; and libibverbs1 from the system, with or without RDMA ({error})"
        )
        raise LinkError(reason) from None
    return TransferEngine


class Mooncake:
    """A `Library`."""

    scheme = "mooncake"

    def __init__(self) -> None:
        self._engine: Any = load()()

    def target(self, staging: Staging, host: str) -> MooncakeTarget:
        self._start(host, staging)
        return MooncakeTarget(self._engine, staging, host)

    def writer(self, staging: Staging, host: str, place: bytes, address: int) -> MooncakeWriter:
        self._start(host, staging)
        return MooncakeWriter(self._engine, staging, place.decode(), address)

    def _start(self, host: str, staging: Staging) -> None:
        protocol = "rdma" if has_rdma() else "tcp"
        if self._engine.initialize(_bracketed(host), "P2PHANDSHAKE", protocol, ""):
            raise LinkError(f"Mooncake does not start at {host} over {protocol}")
        if self._engine.register_memory(staging.address, staging.num_bytes):
            raise LinkError(f"Mooncake cannot register {staging.num_bytes} bytes")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class MooncakeTarget:
    """A `Target`. Its place is the name by which peers ask this engine for what it has registered."""

    def __init__(self, engine: Any, staging: Staging, host: str) -> None:
        self._engine, self._address = engine, staging.address
        self._name = f"{_bracketed(host)}:{engine.get_rpc_port()}"

    def place(self) -> bytes:
        return self._name.encode()

    def pump(self) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._engine.unregister_memory(self._address)
        del self._engine


class MooncakeWriter:
    """A `Writer`."""

    def __init__(self, engine: Any, staging: Staging, name: str, address: int) -> None:
        self._engine, self._name, self._here, self._there = engine, name, staging.address, address

    def start(self, offset: int, num_bytes: int) -> Any:
        here, there = self._here + offset, self._there + offset
        write = self._engine.transfer_submit_write(self._name, here, there, num_bytes)
        if write in (0, -1):
            raise LinkError(f"Mooncake cannot write to {self._name}")
        return write

    def is_done(self, write: Any) -> bool:
        state = self._engine.transfer_check_status(write)
        if state not in (DONE, PENDING):
            raise LinkError(f"Mooncake: a write to {self._name} failed ({state})")
        return bool(state == DONE)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._engine.unregister_memory(self._here)
        del self._engine
