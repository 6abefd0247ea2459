"""Where other machines' pools ask this one: a thread that lets them in, and one for each that speaks with it.

What may be read or written is the pool's to say: connections put their wishes into a queue, the pool's own thread takes
them (`turn`) and answers. Knows sockets, records and slots; decides nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from penstock.cluster.pool_frames import LEAST_BYTES_S, Asked, Find, Get, Put, RecordLine, check_keys, why
from penstock.core.tiering import (
    NO_TIER,
    Fetch,
    Fetched,
    Filled,
    Match,
    Matched,
    Release,
    Reserve,
    Reserved,
    ToEngine,
    ToPool,
    key_group,
)
from penstock.tiers.arena import Arena
from penstock.tiers.driver import PoolDriver
from penstock.transfer.frames import Identity, LinkError, ProtocolError
from penstock.transfer.streams import Greeting
from penstock.transfer.tcp import listen, prepare

log = logging.getLogger("penstock.pool")

PEER = "peer "  # how a connection's name begins among the pool's sources
MAX_PEERS = 64
ANSWER_S = 5.0  # for blocks to come up from disk; far below a lease, as is all that a peer is waited for
SLACK_S = 5.0


class _Met:
    """A connection has begun."""


class _Lost:
    """A connection has ended."""


class _Guest:
    """One connection: its questions, and the pool's answers to them."""

    def __init__(self, name: str, line: RecordLine, tell: Callable[[str, Any], None]) -> None:
        self.name, self.line = name, line
        self.answers: SimpleQueue[ToEngine] = SimpleQueue()
        self._tell = tell
        self._ids = itertools.count()

    def next_id(self) -> int:
        return next(self._ids)

    def tell(self, message: ToPool) -> None:
        self._tell(self.name, message)

    def answer(self, id_: int) -> Any:
        """The pool's last word on the question. Raises TimeoutError."""
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            try:
                found = self.answers.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except Empty:
                raise TimeoutError from None
            if isinstance(found, Matched | Reserved | Fetched) and found.id == id_:
                if not isinstance(found, Fetched) or found.final:
                    return found


class PoolListener:
    """Listens at `address`, "tcp://host:port"; `wake` is called when `turn` has something to do.

    Raises ValueError for an address that is none, OSError when it cannot be had.
    """

    def __init__(self, address: str, identity: Identity, arena: Arena, wake: Callable[[], None]) -> None:
        self._identity, self._arena, self._wake = identity, arena, wake
        self._sock, self.address = listen(address)
        self._inbox: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._guests: dict[str, _Guest] = {}
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name=f"listen {self.address}", daemon=True)
        self._thread.start()

    # ---- the pool's thread ----

    def turn(self, driver: PoolDriver, now: float) -> None:
        """What peers have asked since the last call."""
        while not self._inbox.empty():
            name, message = self._inbox.get()
            if isinstance(message, _Met):
                driver.pool.peers.add(name)
            elif isinstance(message, _Lost):
                driver.lost(name, now)
            else:
                for to, answer in driver.handle(name, message, now):
                    self.deliver(to, answer)

    def deliver(self, name: str, answer: ToEngine) -> None:
        """What the pool says to a source whose name begins with PEER."""
        with self._lock:
            guest = self._guests.get(name)
        if guest is not None:
            guest.answers.put(answer)

    def close(self) -> None:
        """Hang up on everybody. Ends within seconds."""
        with self._lock:
            self._closing = True
            threads = [self._thread, *self._threads]
            for guest in self._guests.values():
                with contextlib.suppress(OSError):
                    guest.line.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes accept
        for thread in threads:
            thread.join(10.0)
        self._sock.close()

    # ---- threads of connections ----

    def _say(self, name: str, message: Any) -> None:
        self._inbox.put((name, message))
        self._wake()

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("%s: cannot accept: %s", self.address, error)
                    time.sleep(0.1)
                continue
            with self._lock:
                if self._closing or len(self._threads) >= MAX_PEERS:
                    sock.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(sock,), name=f"at {self.address}", daemon=True)
                self._threads.add(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        who, guest = "somebody", None
        try:
            who = Greeting(sock, self._identity, self.address).answer().name
            prepare(sock)
            guest = _Guest(f"{PEER}{next(self._numbers)}", RecordLine(sock), self._say)
            with self._lock:
                self._guests[guest.name] = guest
                if self._closing:
                    return
            self._say(guest.name, _Met())
            while True:
                self._answer(guest, guest.line.asked())
        except EOFError:
            pass
        except (LinkError, OSError) as error:
            if not self._closing:
                log.warning("%s: %s: %s", self.address, who, why(error))
        finally:
            if guest is not None:
                self._say(guest.name, _Lost())
            with self._lock:
                if guest is not None:
                    del self._guests[guest.name]
                self._threads.discard(threading.current_thread())
            sock.close()

    def _answer(self, guest: _Guest, asked: Asked) -> None:
        check_keys(asked, self._arena.formats)
        if isinstance(asked, Find):
            guest.line.say(self._find(guest, asked.keys), time.monotonic() + SLACK_S)
        elif isinstance(asked, Get):
            self._get(guest, asked)
        else:
            self._put(guest, asked)

    def _find(self, guest: _Guest, keys: tuple[bytes, ...]) -> tuple[bool, ...]:
        id_ = guest.next_id()
        guest.tell(Match(id_, keys))
        return tuple(tier != NO_TIER for tier in guest.answer(id_).tiers)

    def _get(self, guest: _Guest, asked: Get) -> None:
        """Straight from the slots, which are pinned meanwhile."""
        num, id_ = len(asked.keys), guest.next_id()
        guest.tell(Fetch(id_, asked.keys, (b"",) * num, (0.0,) * num))
        try:
            slots = guest.answer(id_).slots
            there = [(key, slot) for key, slot in zip(asked.keys, slots, strict=True) if slot]
            views = [record.data for record in self._arena.records(*zip(*there, strict=True))] if there else []
            deadline_s = self._deadline(views)
            guest.line.say(tuple(map(bool, slots)), deadline_s)
            guest.line.send(views, deadline_s)
        finally:
            guest.tell(Release(id_))

    def _put(self, guest: _Guest, asked: Put) -> None:
        """Straight into slots; what is not whole is not kept."""
        if len(set(asked.keys)) < len(asked.keys):
            raise ProtocolError("a block twice in one message")
        id_ = guest.next_id()
        guest.tell(Reserve(id_, asked.keys, asked.parents, asked.costs_s))
        slots = guest.answer(id_).slots
        records = {key: self._arena.record(key_group(key), n) for key, n in zip(asked.keys, slots, strict=True) if n}
        deadline_s = self._deadline([record.data for record in records.values()])
        guest.line.say(tuple(map(bool, slots)), deadline_s)
        filled = dict.fromkeys(asked.keys, False)
        for key, record in records.items():
            guest.line.receive(record.data, deadline_s)
            filled[key] = self._arena.formats[key_group(key)].is_whole(record, key)
        guest.tell(Filled(id_, tuple(filled.values())))
        guest.line.say(self._find(guest, asked.keys), time.monotonic() + SLACK_S)

    def _deadline(self, views: list[memoryview]) -> float:
        return time.monotonic() + SLACK_S + sum(map(len, views)) / LEAST_BYTES_S
