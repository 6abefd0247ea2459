"""The pool of a machine's KV tiers in a process of its own, and the line that engines speak to it by. Knows zmq.

Messages are those of `core/tiering.py`. The arena's memory is a file that engines map: only slots' numbers travel.
Other machines' pools are let in where the settings say so (`pool_listener.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from penstock.cluster.pool_frames import pool_identity
from penstock.cluster.pool_listener import PEER, PoolListener
from penstock.cluster.pool_store import PeerStore
from penstock.config.kv_pool import SCHEME, PoolSettings, listen_address, peer_address
from penstock.config.model import KVLayout
from penstock.core import tiering
from penstock.core.kv_pool import Answers
from penstock.core.pool_contents import PoolContents
from penstock.core.pool_status import pool_status
from penstock.core.tiering import News, PoolChanged, PoolHolds, ToEngine, ToPool, WantContents
from penstock.tiers.arena import Arena, ArenaError, discard
from penstock.tiers.driver import PoolDriver
from penstock.tiers.open import host_slots, open_pool

log = logging.getLogger("penstock.pool")

IDLE_WAIT_MS = 50
STATUS_S = 1.0
LOOK_S = 0.2  # after a connection broke: by then it shows whose it was
SILENCE_S = 10.0  # after which a pool is held to be gone
GRACE_MS = 20
GREET_S = 5.0  # between an engine's Hellos, until it is welcome
HELLO_S = 60.0  # for the pool to open its stores and recover what the disk holds
DEAD_S = 10.0  # without anybody listening; one that is started again takes less


class PoolGone(Exception):
    """The machine's pool does not answer."""


@dataclass(frozen=True, slots=True)
class Hello:
    """An engine's first word: how it keeps KV. The first engine's layout is the pool's.

    Each of an engine's own has a larger `number`: it says it again to a pool that was started again, or was silent.
    """

    layout: KVLayout
    number: int = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """Where the arena is; or why the engine cannot share it."""

    arena: str = ""
    num_slots: tuple[int, ...] = ()
    refusal: str = ""
    number: int = 0  # of the Hello


@dataclass(frozen=True, slots=True)
class Stranger:
    """To an engine whose Hello this pool has not heard: another process of it did, which is gone."""


_TYPES: dict[str, Any] = {
    each.__name__: each
    for each in (Hello, Welcome, Stranger, tiering.Match, tiering.Fetch, tiering.Release, tiering.Reserve,
                 tiering.Filled, tiering.Matched, tiering.Fetched, tiering.Reserved, tiering.Expired,
                 tiering.PoolStatus, tiering.WantContents, tiering.PoolChanged, tiering.PoolHolds)
}  # fmt: skip
_DECODERS = {name: msgspec.msgpack.Decoder(type_) for name, type_ in _TYPES.items()}
_encode = msgspec.msgpack.Encoder().encode


def encode(message: Any) -> list[bytes]:
    return [type(message).__name__.encode(), _encode(message)]


def decode(name: bytes, body: bytes) -> Any:
    """Raises KeyError or msgspec.DecodeError for what no version of this file says."""
    return _DECODERS[name.decode()].decode(body)


def open_machine_pool(
    settings: PoolSettings, layout: KVLayout, arena: Arena, wake: Callable[[], None] = lambda: None
) -> PoolDriver:
    """The pool at work, with another machine's as a tier where that is its remote one. Raises ConfigError."""
    address = peer_address(settings.cache.kv_remote_url)
    remote = None if address is None else PeerStore(address, layout, settings.secret)
    return open_pool(settings.cache, layout, arena, remote, wake)


class PoolServer:
    """Serves the engines of one machine at `directory`/pool until `stop` says so, and its peers where it listens.

    An engine's connection breaks when its process ends, whatever ended it: then what the pool holds for it goes. zmq
    says that one broke, but not whose; who cannot be sent to is gone.
    """

    def __init__(self, settings: PoolSettings, directory: Path) -> None:
        self.settings, self.directory = settings, directory
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._broken = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.bind(f"ipc://{directory}/pool")
        self._arena: Arena | None = None
        self._layout: KVLayout | None = None
        self._driver: PoolDriver | None = None
        self._contents: PoolContents | None = None
        self.listener: PoolListener | None = None
        self._sources: set[bytes] = set()  # who has said Hello
        self._told_s = self._look_until_s = float("-inf")
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)
        self._poller.register(self._broken, zmq.POLLIN)

    def run(self, stop: Callable[[], bool]) -> None:
        while not stop():
            self._poller.poll(IDLE_WAIT_MS)
            self.turn()

    def _wake(self) -> None:
        """From any thread: `turn` has something to do."""
        with contextlib.suppress(BlockingIOError):  # it was told often enough
            self._waker.send(b"\0")

    def turn(self) -> None:
        """Take in what has come, answer what can be answered."""
        now = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._broken.poll(0):
            self._broken.recv_multipart(zmq.NOBLOCK)
            self._look_until_s = now + LOOK_S
        is_missed = SILENCE_S < now - self._told_s < float("inf")
        for _ in range(256):
            try:
                source, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = decode(*frames)
            except (KeyError, TypeError, UnicodeDecodeError, msgspec.DecodeError) as error:
                log.error("dropped a message that does not decode: %s", error)
                continue
            if isinstance(message, Hello):
                if source in self._sources and self._driver is not None:  # it holds this one to have been gone,
                    self._driver.lost(source.hex(), now)
                    is_missed = True  # and has told routers so
                self._sources.add(source)
                self._send(source, replace(self._hello(message), number=message.number))
            elif source not in self._sources:
                self._send(source, Stranger())  # or to nobody: the last word of a dead one
            elif isinstance(message, WantContents):
                if self._contents is not None:
                    self._send(source, PoolHolds(self._contents.snapshot()))
            elif self._driver is not None:
                self._deliver(self._driver.handle(source.hex(), message, now))
        if self._driver is not None:
            if self.listener is not None:
                self.listener.turn(self._driver, now)
            self._deliver(self._driver.poll(now))
            if is_missed:
                self._contents = PoolContents(self._driver.pool, time.time_ns())
            events = self._contents.take(now) if self._contents is not None else None
            if events is not None:
                for source in self._sources:
                    self._send(source, PoolChanged(events))
            self._look(self._driver, now)

    def _look(self, driver: PoolDriver, now: float) -> None:
        """Tell all engines how the pool is, and find out who is gone."""
        if now - self._told_s <= STATUS_S and now > self._look_until_s:
            return
        self._told_s, status = now, pool_status(driver.pool)
        for source in [source for source in self._sources if not self._send(source, status)]:
            self._sources.discard(source)
            driver.lost(source.hex(), now)

    def _hello(self, message: Hello) -> Welcome:
        path, cache = self.directory / "arena", self.settings.cache
        if self._driver is None:
            try:
                if self._arena is None:
                    discard(path)  # of a pool that died here
                    self._arena = Arena.create(path, message.layout, host_slots(cache, message.layout))
                if cache.kv_pool_listen is not None and self.listener is None:
                    self.listener = self._listen(cache.kv_pool_listen, message.layout, self._arena)
                self._driver = open_machine_pool(self.settings, message.layout, self._arena, self._wake)
            except Exception as error:
                return Welcome(refusal=str(error))
            self._layout = message.layout
            self._contents = PoolContents(self._driver.pool, time.time_ns())
        assert self._arena is not None and self._layout is not None
        if message.layout.format != self._layout.format:
            return Welcome(refusal=f"the pool keeps KV as {self._layout.format}, the engine as {message.layout.format}")
        return Welcome(str(path), self._arena.num_slots)

    def _listen(self, place: str, layout: KVLayout, arena: Arena) -> PoolListener:
        """Raises OSError that names the address."""
        identity = pool_identity(f"the KV pool of {socket.gethostname()} ({os.getpid()})", layout, self.settings.secret)
        try:
            listener = PoolListener(listen_address(place), identity, arena, self._wake)
        except OSError as error:
            raise OSError(f"--kv-pool-listen {place}: {error.strerror or error}") from None
        log.info("other machines find this pool at %s", listener.address.replace("tcp://", SCHEME))
        return listener

    def _deliver(self, answers: Answers) -> None:
        for to, answer in answers:
            if not to.startswith(PEER):
                self._send(bytes.fromhex(to), answer)
            elif self.listener is not None:
                self.listener.deliver(to, answer)

    def _send(self, to: bytes, message: Any) -> bool:
        """Whether somebody is there; one that does not read costs nothing."""
        try:
            self._socket.send_multipart([to, *encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def close(self) -> None:
        self._socket.disable_monitor()
        self._broken.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()
        if self.listener is not None:
            self.listener.close()
        if self._driver is not None:
            self._driver.close()
        self._woken.close()
        self._waker.close()


class PoolWire:
    """A PoolLine to a PoolServer. One thread calls it.

    A pool that is silent for long, or knows this engine no more, is lost until it has said Welcome again. `on_arena` is
    called with None when it is lost, and with its memory when it is back, before anything else is heard of it.
    """

    def __init__(self, directory: str, layout: KVLayout) -> None:
        self.layout = layout
        self.on_arena: Callable[[Arena | None], None] = lambda arena: None
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._path = f"{directory}/pool"
        self._socket.connect(f"ipc://{self._path}")  # and again, by itself, to a pool that is started again
        self._heard_s = 0.0
        self._number = 0  # of the last Hello
        self._hello_s: float | None = None  # when it was said, while there is no Welcome to it
        self._problem = ""  # of joining, as it was logged last

    def join(self) -> Arena:
        """The pool's memory. Waits. Raises PoolGone if it does not answer, ValueError if it refuses."""
        begin = dead_since = now = time.monotonic()
        why = f"the pool of KV tiers did not answer within {HELLO_S:g} s"
        while now - begin < HELLO_S:
            self._greet(now)
            if self._socket.poll(250):
                welcome = decode(*self._socket.recv_multipart())
                if isinstance(welcome, Welcome) and welcome.number == self._number:
                    if welcome.refusal:
                        raise ValueError(welcome.refusal)
                    try:
                        arena = self._arena(welcome)
                    except (OSError, ArenaError) as error:  # the pool may just be making another
                        why = str(error)
                    else:
                        self._hello_s, self._heard_s = None, time.monotonic()
                        return arena
            now = time.monotonic()
            if not self._is_dead():
                dead_since = now
            elif now - dead_since > DEAD_S:
                raise PoolGone("the process of the pool of KV tiers has ended")
        raise PoolGone(why)

    def _arena(self, welcome: Welcome) -> Arena:
        return Arena.attach(Path(welcome.arena), self.layout, welcome.num_slots)

    def _is_dead(self) -> bool:
        """Nobody listens where somebody did. One that has yet to begin is not dead."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
        return False

    def send(self, message: ToPool | WantContents, now: float) -> None:
        if self._hello_s is None:
            with contextlib.suppress(zmq.Again):  # a pool that does not read is lost soon
                self._socket.send_multipart(encode(message), zmq.NOBLOCK)

    def is_lost(self, now: float) -> bool:
        """Nothing was heard of it for long, for it speaks every second; or it is another, not joined yet."""
        return self._hello_s is not None

    def receive(self, now: float) -> Sequence[ToEngine | News]:
        received: list[ToEngine | News] = []
        # Before it is missed it gets a moment: this process may have been stopped, and all that was sent be on its way.
        while self._socket.poll(GRACE_MS if now - self._heard_s > SILENCE_S and not self.is_lost(now) else 0):
            message = decode(*self._socket.recv_multipart(zmq.NOBLOCK))
            self._heard_s = now
            if isinstance(message, Welcome):
                self._welcomed(message)
            elif isinstance(message, Stranger):
                if not self.is_lost(now):
                    self._lose()
                    break  # a Welcome comes in another call: whoever calls sees that it was lost
            elif not self.is_lost(now):
                received.append(message)
        if now - self._heard_s > SILENCE_S and not self.is_lost(now):
            self._lose()
        if not self.is_lost(now):
            return received
        self._greet(now)
        return []  # what another pool has said before counts no more

    def _lose(self) -> None:
        self._hello_s = float("-inf")
        self.on_arena(None)

    def _greet(self, now: float) -> None:
        """Say Hello, and again when it might have got lost. zmq keeps it for a pool that does not listen yet."""
        if self._hello_s is None or now - self._hello_s > GREET_S:
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(encode(Hello(self.layout, self._number + 1)), zmq.NOBLOCK)
                self._number += 1
                self._hello_s = now

    def _welcomed(self, welcome: Welcome) -> None:
        if self._hello_s is None or welcome.number != self._number:
            return
        try:
            if welcome.refusal:
                raise ValueError(welcome.refusal)
            arena = self._arena(welcome)
        except (ValueError, OSError, ArenaError) as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.error("the pool of KV tiers cannot be joined again yet: %s", error)
            return
        self._hello_s, self._problem = None, ""
        self.on_arena(arena)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
