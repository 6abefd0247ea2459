"""Where peers connect: one thread that lets them in, one for each that sends. Knows sockets, not what is received."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import socket
import tempfile
import threading
from typing import Protocol

from penstock.transfer import mooncake, nixl, shm, tcp
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.receipts import FrameReader, Receipts
from penstock.transfer.streams import Greeting, Incoming

log = logging.getLogger("penstock.transfer")


class Carrier(Protocol):
    """What a link is to a listener: one of its files."""

    MAX_CONNECTIONS: int  # of one listener; more are closed unheard

    def listen(self, address: str) -> tuple[socket.socket, str]: ...

    def incoming(self, sock: socket.socket, ring_bytes: int) -> Incoming: ...


CARRIERS: dict[str, Carrier] = {"tcp": tcp, "shm": shm, "nixl": nixl, "mooncake": mooncake}


class Listener:
    """Listens at "tcp://host:port" (port 0: a free one), nixl and mooncake likewise, or at "shm:///path" ("shm://": in
    a private directory).

    `address` is what peers dial. Raises ValueError for an address that is none, OSError when it cannot be had,
    LinkError when its link is not installed.
    """

    def __init__(self, address: str, identity: Identity, receipts: Receipts, ring_bytes: int) -> None:
        self._identity, self._receipts, self._ring_bytes = identity, receipts, ring_bytes
        self._directory: str | None = None
        scheme, _, _ = address.partition("://")
        if scheme not in CARRIERS:
            raise ValueError(f"{address!r} is no link address")
        self._carrier = CARRIERS[scheme]
        if address == "shm://":
            self._directory = tempfile.mkdtemp(prefix="penstock-")
            address = "shm://" + os.path.join(self._directory, "link")
        try:
            self._sock, self.address = self._carrier.listen(address)
        except BaseException:
            self._remove()
            raise
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name=f"listen {self.address}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up on everybody and free the address. Ends within seconds, whatever peers do. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            threads = list(self._connections.values())
            for sock in self._connections:
                with contextlib.suppress(OSError):  # not connected any more
                    sock.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
        self._waker.send(b"\0")
        for thread in [self._thread, *threads]:
            thread.join(10.0)
        for sock in (self._sock, self._wake, self._waker):
            sock.close()
        self._remove()

    def _remove(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        elif hasattr(self, "address") and self.address.startswith("shm://"):
            with contextlib.suppress(OSError):
                os.unlink(shm.parse(self.address))

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        self._sock.setblocking(False)
        while not self._closing:
            poll.poll()
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                continue
            except OSError as error:  # the peer has gone again, or no descriptor is left
                log.warning("%s: cannot accept: %s", self.address, error)
                self._wake.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    self._wake.recv(1)
                continue
            with self._lock:
                if self._closing or len(self._connections) >= self._carrier.MAX_CONNECTIONS:
                    sock.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(sock,), name=f"at {self.address}", daemon=True)
                self._connections[sock] = thread
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        who, incoming = "somebody", None
        try:
            hello = Greeting(sock, self._identity, self.address).answer()
            who = hello.name
            incoming = self._carrier.incoming(sock, self._ring_bytes)
            reader = FrameReader(self._receipts, who, incoming.reply)
            while not self._closing:
                if not reader.take(incoming.read):
                    incoming.wait()
        except EOFError:
            pass
        except (LinkError, OSError) as error:
            if not self._closing:
                log.warning("%s: %s: %s", self.address, who, error)
        finally:
            with self._lock:
                del self._connections[sock]
            sock.close()
            if incoming is not None:
                incoming.close()
