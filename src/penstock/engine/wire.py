"""How messages travel between front end and engine: two deques in one process, or a zmq pair between two.

A wire knows the two message unions. It does not know what a message means, nor what a request, a token or a step is.
Every end has `send(message)`, a non-blocking `receive()` and `wait(timeout_s)`; it has exactly one other end.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from penstock.config.socket_directory import SocketDirectory
from penstock.engine.messages import FromEngine, ToEngine

log = logging.getLogger("penstock.wire")

MAX_QUEUED = 8192  # messages per direction that zmq keeps before `send` waits: a step of 256 streams is 5 kB

RETRY_S = 0.05  # a loop looks this often whether a full wire takes messages again


class WireFull(RuntimeError):
    """The other end is not there yet, or has not read for so long that the bounded queue is full."""


class LocalWire:
    """One end of an in-process pair. Messages are handed over as they are; nothing is copied or encoded."""

    def __init__(self, outbox: deque[Any], inbox: deque[Any]) -> None:
        self._outbox, self._inbox = outbox, inbox

    def send(self, message: Any) -> None:
        self._outbox.append(message)

    def receive(self) -> list[Any]:
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def wait(self, timeout_s: float) -> bool:
        """Whether something has arrived. Never waits: with one thread nobody could send meanwhile."""
        return bool(self._inbox)

    def close(self) -> None:
        self._inbox.clear()


def local_pair() -> tuple[LocalWire, LocalWire]:
    """(front's end, engine's end) of a wire inside one process, for one thread."""
    to_engine: deque[ToEngine] = deque()
    to_front: deque[FromEngine] = deque()
    return LocalWire(to_engine, to_front), LocalWire(to_front, to_engine)


class ZmqWire:
    """One end of a zmq PAIR. Not thread-safe: one thread per end.

    `send` never waits longer than `send_timeout_s` and raises WireFull then. A frame that does not decode is logged
    and dropped: both ends are of one version, so it can only come from somebody who does not belong here.
    """

    def __init__(self, incoming: Any, send_timeout_s: float) -> None:
        self._context = zmq.Context(io_threads=1)
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.SNDHWM, MAX_QUEUED)
        self.socket.setsockopt(zmq.RCVHWM, MAX_QUEUED)
        self.socket.setsockopt(zmq.SNDTIMEO, int(send_timeout_s * 1000))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._directory: SocketDirectory | None = None
        self.address = ""

    def send(self, message: Any) -> None:
        """Queue a message. Raises WireFull when the bounded queue stays full or nobody has ever dialled."""
        self.send_encoded(self.encode(message))

    def encode(self, message: Any) -> bytes:
        """The frame of a message."""
        return self._encoder.encode(message)

    def send_encoded(self, frame: bytes) -> None:
        """`send` for a frame of `encode`."""
        try:
            self.socket.send(frame)
        except zmq.Again:
            raise WireFull("the other end is not there, or does not read") from None

    def receive(self, max_messages: int = 1024) -> list[Any]:
        """What has arrived, at most `max_messages`, without waiting."""
        received: list[Any] = []
        for _ in range(max_messages):
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                received.append(self._decoder.decode(frame))
            except (msgspec.DecodeError, ValueError) as error:
                log.error("dropped a message that does not decode: %s", error)
        return received

    def wait(self, timeout_s: float) -> bool:
        """Block until something can be received or the time is over; whether something can."""
        return bool(self.socket.poll(max(0, int(timeout_s * 1000)), zmq.POLLIN))

    def close(self, linger_s: float = 1.0) -> None:
        """Give queued messages `linger_s` to leave, then free the socket and the address. Safe to call twice."""
        if not self.socket.closed:
            self.socket.close(linger=int(linger_s * 1000))
            self._context.term()
        if self._directory is not None:
            self._directory.close()


def listen(address: str | None = None) -> ZmqWire:
    """The front end's end. It binds `address`; without one, a socket file in a directory only this user can enter
    (TCP on 127.0.0.1 where zmq has no ipc). `wire.address` is what the engine dials.

    Sends never wait: a front end that blocks would freeze every stream.
    """
    wire = ZmqWire(FromEngine, send_timeout_s=0.0)
    if address is None and zmq.has("ipc"):
        wire._directory = SocketDirectory()
        address = "ipc://" + os.path.join(wire._directory.path, "engine")
    try:
        wire.socket.bind(address or "tcp://127.0.0.1:*")
    except zmq.ZMQError:
        wire.close(0.0)
        raise
    wire.address = wire.socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return wire


def dial(address: str) -> ZmqWire:
    """The engine's end: connects to a front end's `address`, which need not exist yet.

    A send waits up to 30 s for a front end that does not read, then raises WireFull.
    """
    wire = ZmqWire(ToEngine, send_timeout_s=30.0)
    wire.address = address
    wire.socket.connect(address)
    return wire


class LoopWire:
    """Feeds what arrives at a ZmqWire to a callback inside a running asyncio loop, in batches.

    zmq's descriptor is edge-triggered: it fires once, and any use of the socket may swallow the edge. So a wake-up
    reads until nothing is left (in slices of `max_batch`, so that streams get their turn), and every send looks again.
    """

    def __init__(
        self,
        wire: ZmqWire,
        loop: asyncio.AbstractEventLoop,
        on_messages: Callable[[Sequence[Any]], None],
        max_batch: int = 64,
    ) -> None:
        self._wire, self._loop, self._on_messages, self._max_batch = wire, loop, on_messages, max_batch
        self._closed = False
        self._scheduled = False
        self._unsent: deque[bytes] = deque()
        self._fd = int(wire.socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._read)
        self._look_again()

    @property
    def is_full(self) -> bool:
        """The engine does not read: give it nothing new. What it must know, such as a cancel, may still be sent."""
        return bool(self._unsent)

    def send(self, message: Any) -> None:
        """Queue a message for the engine. Never fails: what the full wire does not take is kept and tried again."""
        if self._closed:
            return
        self._unsent.append(self._wire.encode(message))  # what cannot be encoded is its sender's error
        if len(self._unsent) == 1:
            self._flush()
        self._look_again()

    def _flush(self) -> None:
        while self._unsent and not self._closed:
            try:
                self._wire.send_encoded(self._unsent[0])
            except WireFull:
                self._loop.call_later(RETRY_S, self._flush)
                return
            self._unsent.popleft()

    def close(self) -> None:
        """Stop feeding. The wire itself stays open and is its owner's to close."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)

    def _read(self) -> None:
        if self._closed:
            return
        self._scheduled = False
        batch = self._wire.receive(self._max_batch)
        try:
            if batch:
                self._on_messages(batch)
        finally:
            self._look_again()

    def _look_again(self) -> None:
        if not self._scheduled and not self._closed and int(self._wire.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._scheduled = True
            self._loop.call_soon(self._read)
