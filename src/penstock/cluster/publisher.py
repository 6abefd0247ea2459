"""An engine's cache events on a PUB socket, for routers elsewhere; past ones again on a ROUTER socket, as vLLM has it.

Called from the engine's loop, waits for nobody. Knows zmq and the format; does not know who listens.
"""

from __future__ import annotations

import logging
import time
from collections import deque

import zmq

from penstock.cluster.kv_events import FormatError, encode, replay
from penstock.config.kv_events import FLAG, EventSettings
from penstock.config.values import ConfigError
from penstock.core.kv_cache import KVCache
from penstock.core.kv_events import KVEventSource

log = logging.getLogger("penstock.events")

MAX_REPLAYS = 8  # requests answered in one turn of the engine


class EventPublisher:
    """Publishes what happens in `cache` from now on. Raises ConfigError for an address that cannot be had."""

    def __init__(self, settings: EventSettings, engine: str, cache: KVCache) -> None:
        self.settings = settings
        self._source = KVEventSource(engine, time.time_ns(), cache.events_pool.index.keys, with_tokens=True)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=settings.buffer_steps)
        self._context = zmq.Context(io_threads=1)
        self._events = self._context.socket(zmq.PUB)
        self._events.setsockopt(zmq.SNDHWM, settings.hwm)
        self._replay = self._context.socket(zmq.ROUTER)
        try:
            self._open(self._events, settings.endpoint)
            if settings.replay_endpoint is not None:
                self._open(self._replay, settings.replay_endpoint)
        except ConfigError:
            self.close()
            raise
        cache.tell(self._source)

    def turn(self, now: float) -> None:
        """Tell what is due, answer who has missed something. To be called often."""
        events = self._source.take(now)
        if events is not None:
            frames = encode(events, time.time(), self.settings.topic, 0)
            self._kept.append((events.seq, frames[2]))
            self._events.send_multipart(frames, zmq.NOBLOCK)
        if self.settings.replay_endpoint is None:
            return
        for _ in range(MAX_REPLAYS):
            try:
                asked = self._replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(asked)

    def close(self) -> None:
        """Free the addresses."""
        for socket in (self._events, self._replay):
            socket.close(linger=0)
        self._context.term()

    def _answer(self, asked: list[bytes]) -> None:
        try:
            for frames in replay(self._kept, asked, self.settings.topic):
                self._replay.send_multipart(frames, zmq.NOBLOCK)
        except FormatError as error:
            log.warning("a replay request that is none: %s", error)
        except zmq.Again:
            log.warning("a subscriber does not read the replay it has asked for")

    @staticmethod
    def _open(socket: zmq.Socket[bytes], endpoint: str) -> None:
        """Bind, or connect where vLLM does: to an address that names a host."""
        binds = "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://", "tcp://127.0.0.1:"))
        try:
            socket.bind(endpoint) if binds else socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"{endpoint}: {error.strerror}", FLAG) from None
