"""The NIXL link: NVIDIA's transfer library writes over what it finds best here: RDMA, shared memory or TCP (UCX).

An agent for each end of each connection: it holds one registration and ends with it. NIXL's progress thread is left
off, for it takes most of a core at rest; both ends look after their agents while something is on its way.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from typing import Any

from penstock.transfer import onesided
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.onesided import MAX_CONNECTIONS, OneSidedOutgoing, Staging
from penstock.transfer.ring import RingIncoming

__all__ = ["MAX_CONNECTIONS", "dial", "incoming", "listen"]

MEMORY = "DRAM"
BACKEND = "UCX"


def listen(address: str) -> tuple[socket.socket, str]:
    """As `tcp.listen`, for "nixl://host:port". Raises LinkError where the library is not installed."""
    load()
    return onesided.listen("nixl", address)


def dial(address: str, identity: Identity) -> OneSidedOutgoing:
    """Raises LinkError, LinkRefused, OSError."""
    return onesided.dial(Nixl(), address, identity)


def incoming(sock: socket.socket, ring_bytes: int) -> RingIncoming:
    """Raises LinkError, OSError."""
    return onesided.incoming(Nixl(), sock, ring_bytes)


def load() -> Any:
    """The library's Python face. The package `nixl` itself is only a choice between those of its CUDA versions, which
    are alike for host memory, and none of which needs a GPU. Raises LinkError with what is to be installed."""
    try:
        try:
            import nixl_cu12 as api
        except ModuleNotFoundError:
            import nixl_cu13 as api
    except ImportError as error:
        reason = f"the NIXL link needs an extra: pip install 'penstock[nixl]' ({error})"
        raise LinkError(reason) from None
    logging.getLogger("nixl").setLevel(logging.WARNING)  # else it greets on standard output
    return api


class Nixl:
    """A `Library`."""

    scheme = "nixl"

    def __init__(self) -> None:
        api = load()
        settings = api.nixl_agent_config(
            enable_prog_thread=False, backends=[BACKEND], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE
        )
        try:
            self._agent: Any = api.nixl_agent(secrets.token_hex(8), settings)
        except Exception as error:  # its own kinds, which differ between versions
            raise LinkError(f"NIXL does not start: {error}") from None

    def target(self, staging: Staging, host: str) -> NixlTarget:
        return NixlTarget(self._agent, staging)

    def writer(self, staging: Staging, host: str, place: bytes, address: int) -> NixlWriter:
        return NixlWriter(self._agent, staging, place, address)


def _register(agent: Any, staging: Staging) -> Any:
    try:
        return agent.register_memory([(staging.address, staging.num_bytes, 0, "")], MEMORY, [BACKEND])
    except Exception as error:
        raise LinkError(f"NIXL cannot register {staging.num_bytes} bytes: {error}") from None


class NixlTarget:
    """A `Target`."""

    def __init__(self, agent: Any, staging: Staging) -> None:
        self._agent = agent
        self._region = _register(agent, staging)

    def place(self) -> bytes:
        return bytes(self._agent.get_partial_agent_metadata(self._region, True, [BACKEND]))

    def pump(self) -> None:
        self._agent.get_new_notifs([BACKEND])  # there are none; what looks for them moves everything else on

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the memory is retired whatever the library thinks of it
            self._agent.deregister_memory(self._region, [BACKEND])
        del self._agent, self._region


class NixlWriter:
    """A `Writer`."""

    def __init__(self, agent: Any, staging: Staging, place: bytes, address: int) -> None:
        self._agent, self._here, self._there = agent, staging.address, address
        self._region = _register(agent, staging)
        try:
            name = agent.add_remote_agent(place)
        except Exception as error:
            raise LinkError(f"NIXL cannot use what the other end says of itself: {error}") from None
        self._peer = name.decode() if isinstance(name, bytes) else str(name)
        self._open: list[Any] = []

    def start(self, offset: int, num_bytes: int) -> Any:
        agent = self._agent
        try:
            here = agent.get_xfer_descs([(self._here + offset, num_bytes, 0)], MEMORY)
            there = agent.get_xfer_descs([(self._there + offset, num_bytes, 0)], MEMORY)
            write = agent.initialize_xfer("WRITE", here, there, self._peer, backends=[BACKEND])
            self._open.append(write)
            agent.transfer(write)
        except Exception as error:
            raise LinkError(f"NIXL: {error}") from None
        return write

    def is_done(self, write: Any) -> bool:
        try:
            state = self._agent.check_xfer_state(write)
            if state == "PROC":
                return False
            if state != "DONE":
                raise LinkError(f"NIXL: a write ended as {state}")
            self._open.remove(write)
            write.release()
        except LinkError:
            raise
        except Exception as error:
            raise LinkError(f"NIXL: {error}") from None
        return True

    def close(self) -> None:
        for write in self._open:
            with contextlib.suppress(Exception):  # it cannot be taken back: the agent's end ends it
                write.release()
        self._open.clear()
        with contextlib.suppress(Exception):
            self._agent.deregister_memory(self._region, [BACKEND])
        with contextlib.suppress(Exception):
            self._agent.remove_remote_agent(self._peer)
        del self._agent, self._region
