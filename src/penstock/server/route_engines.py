"""The servers behind a router: whether they are there, what they say of themselves, and their cache events.

One task per engine asks for its health, another listens to what it publishes; both tell a Dispatcher. Knows HTTP paths,
Prometheus names and zmq; places nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from penstock.cluster.dispatcher import Dispatcher, Facts
from penstock.cluster.kv_events import FormatError
from penstock.cluster.remote_cache import RemoteCache
from penstock.config.cluster import EVERYWHERE
from penstock.config.route import EngineAddress, RouteOptions
from penstock.server.http_client import BrokenAnswer, HttpServer, OpenAnswer

log = logging.getLogger("penstock.route")

HEALTH_TIMEOUT_S = 2.0  # at least; else five times the interval
SILENT_S = 2.0  # calls that heard nothing for so long are given up with their engine
REPLAY_TIMEOUT_S = 5.0
MAX_SILENT = 2  # health checks in a row without an answer: one may be lost to a busy machine
_SAMPLE = re.compile(r"^[\w]+:(\w+)(\{[^}]*\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class RemoteEngine:
    """One server as its router speaks to it."""

    def __init__(self, address: EngineAddress, api_key: str | None) -> None:
        self.address = address
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.http = HttpServer(address.url, headers, flag="--engine")
        self.is_up = False
        self.why = "it was not asked yet"
        self.num_silent = 0
        self.answers: set[OpenAnswer] = set()  # that somebody waits for

    @property
    def name(self) -> str:
        return self.address.name

    @contextlib.asynccontextmanager
    async def ask(self, path: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[OpenAnswer]:
        """A POST; leaving the context before its end drops the connection."""
        answer = OpenAnswer(self.http, self.http.request("POST", path, body, **headers))
        self.answers.add(answer)
        try:
            yield answer
        finally:
            self.answers.discard(answer)
            await answer.close()


class RemoteEngines:
    """All of them. `start` and `stop` in the event loop."""

    def __init__(
        self, options: RouteOptions, dispatcher: Dispatcher, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.options, self.dispatcher, self.now = options, dispatcher, now
        self.all = {each.name: RemoteEngine(each, options.engine_api_key) for each in options.engines}
        self._timeout_s = max(HEALTH_TIMEOUT_S, 5 * options.health_interval_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._context: zmq.asyncio.Context | None = None

    def start(self) -> None:
        self._context = zmq.asyncio.Context(io_threads=1)
        for engine in self.all.values():
            self._tasks.append(asyncio.create_task(self._watch(engine)))
        self._tasks.append(asyncio.create_task(self._tick()))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self.all.values():
            engine.http.close()
        if self._context is not None:
            self._context.destroy(linger=0)

    def lost(self, name: str, why: str) -> None:
        """It broke a request off: nothing goes there until it answers again."""
        engine = self.all[name]
        if engine.is_up:
            log.warning("engine %s: %s", name, why)
        engine.is_up, engine.why = False, why
        self.dispatcher.left(name)

    def _silent(self, engine: RemoteEngine, why: str) -> None:
        """It does not even say how it is: nor will calls that wait for it ever hear anything."""
        self.lost(engine.name, why)
        now = time.monotonic()
        for answer in list(engine.answers):
            if now - answer.heard_s > SILENT_S:
                answer.give_up(why)

    # ---- health ----

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.dispatcher.tick(self.now())

    async def _watch(self, engine: RemoteEngine) -> None:
        listening: asyncio.Task[None] | None = None
        try:
            while True:
                await self._look(engine)
                if engine.is_up and listening is None and engine.name in self.dispatcher.caches:
                    listening = asyncio.create_task(self._listen(engine, self.dispatcher.caches[engine.name]))
                await asyncio.sleep(self.options.health_interval_s)
        finally:
            if listening is not None:
                listening.cancel()

    async def _look(self, engine: RemoteEngine) -> None:
        """One health check and its consequences."""
        try:
            status, body = await engine.http.get("/health", self._timeout_s)
            why = "" if status == 200 else f"/health says {status}: {body[:200].decode('utf-8', 'replace')}"
            if not why:
                facts = None if engine.is_up else await self._facts(engine)
                if facts is not None:
                    self._met(engine, facts)
                await self._measure(engine)
                engine.num_silent = 0
                return
        except BrokenAnswer as error:
            engine.num_silent += 1
            if engine.is_up and engine.num_silent < MAX_SILENT and "no end of the answer" in str(error):
                return
            self._warn(engine, str(error))
            self._silent(engine, str(error))
            return
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
            why = f"it answers as no server of models does: {error}"
        self._warn(engine, why)
        self.lost(engine.name, why)

    def _warn(self, engine: RemoteEngine, why: str) -> None:
        """Of what is wrong with one that has not been there yet, once."""
        if not engine.is_up and why != engine.why:
            log.warning("engine %s: %s", engine.name, why)

    def _met(self, engine: RemoteEngine, facts: Facts) -> None:
        address = engine.address
        self.dispatcher.joined(engine.name, facts, self.now(), can_replay=bool(address.replay))
        engine.is_up, engine.why = True, ""
        told = "" if address.events == "" else f", events from {address.events}"
        if address.events and engine.name not in self.dispatcher.caches:
            told = ", its events are of no use: its tokens or blocks are not the router's"
        log.info("engine %s is there: %s%s", engine.name, ", ".join(facts.models), told)

    async def _facts(self, engine: RemoteEngine) -> Facts:
        status, body = await engine.http.get("/v1/models", self._timeout_s)
        if status != 200:
            key = "; it wants --engine-api-key" if status == 401 else ""
            raise ValueError(f"/v1/models says {status}{key}")
        cards = msgspec.json.decode(body)["data"]
        labels = _config_labels(await self._metrics(engine))
        return Facts(
            block_size=_whole(labels.get("block_size")),
            num_blocks=_whole(labels.get("num_gpu_blocks")),
            max_model_len=max((_whole(card.get("max_model_len")) for card in cards), default=0),
            models=tuple(str(card["id"]) for card in cards),
            block_bytes=_whole(labels.get("block_bytes")),
            reads=labels.get("kv_remote", ""),
            serves=_reachable(labels.get("kv_pool", ""), engine.address.url),
        )

    async def _metrics(self, engine: RemoteEngine) -> str:
        """ "" where there are none."""
        status, body = await engine.http.get("/metrics", self._timeout_s)
        return body.decode("utf-8", "replace") if status == 200 else ""

    async def _measure(self, engine: RemoteEngine) -> None:
        sums: dict[str, float] = {}
        remote: dict[str, float] = {}  # of the tier that other machines write, too
        for name, labels, value in _SAMPLE.findall(await self._metrics(engine)):
            if name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"):
                with contextlib.suppress(ValueError):
                    sums[name] = sums.get(name, 0.0) + float(value)
            elif name in ("tier_on", "tier_latency_seconds", "tier_byte_seconds") and 'tier="remote"' in labels:
                with contextlib.suppress(ValueError):
                    remote[name] = float(value)
        if "num_requests_running" in sums:
            usage = sums.get("kv_cache_usage_perc", sums.get("gpu_cache_usage_perc", 0.0))
            running, waiting = int(sums["num_requests_running"]), int(sums.get("num_requests_waiting", 0))
            self.dispatcher.measured(engine.name, running, waiting, min(1.0, usage), self.now())
        if len(remote) == 3:
            latency_s = remote["tier_latency_seconds"] if remote["tier_on"] else None
            self.dispatcher.reads_others(engine.name, latency_s, remote["tier_byte_seconds"])

    # ---- events ----

    async def _listen(self, engine: RemoteEngine, cache: RemoteCache) -> None:
        """Follow what the engine publishes, for as long as the router runs; zmq connects again by itself."""
        assert self._context is not None
        events = self._context.socket(zmq.SUB)
        events.setsockopt(zmq.RCVHWM, 100_000)
        events.setsockopt_string(zmq.SUBSCRIBE, engine.address.topic)
        events.connect(engine.address.events)
        try:
            while True:
                if cache.wanted is not None:
                    await self._replay(engine, cache)
                if not await events.poll(100 if cache.wanted is not None else 10_000):
                    continue
                frames = await events.recv_multipart()
                try:
                    self.dispatcher.changed(cache.told(frames), self.now())
                except FormatError as error:
                    log.warning("%s", error)
        finally:
            events.close(linger=0)

    async def _replay(self, engine: RemoteEngine, cache: RemoteCache) -> None:
        """Have told again what was missed."""
        assert self._context is not None and cache.wanted is not None
        socket = self._context.socket(zmq.DEALER)
        socket.connect(engine.address.replay)
        try:
            await socket.send_multipart([b"", cache.wanted.to_bytes(8, "big")])
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                while cache.wanted is not None:
                    frames = (await socket.recv_multipart())[1:]
                    if len(frames) == 2:
                        frames = [b"", *frames]  # vLLM before 0.11 leaves the topic out here
                    self.dispatcher.changed(cache.replayed(frames), self.now())
        except (TimeoutError, FormatError) as error:
            log.warning("engine %s: no replay from %s: %s", engine.name, engine.address.replay, error or "no answer")
            await asyncio.sleep(1.0)
        finally:
            socket.close(linger=0)


def _config_labels(metrics: str) -> Mapping[str, str]:
    """Of vLLM's cache_config_info."""
    for name, labels, _ in _SAMPLE.findall(metrics):
        if name == "cache_config_info":
            return dict(_LABEL.findall(labels))
    return {}


def _reachable(place: str, url: str) -> str:
    """The address at which others find a pool: its host's, where it listens at all of them."""
    host, _, port = place.rpartition(":")
    if not port:
        return ""
    own = urlsplit(url).hostname or ""
    return f"{(f'[{own}]' if ':' in own else own) if host in EVERYWHERE else host}:{port}"


def _whole(value: object) -> int:
    try:
        return max(0, int(str(value)))
    except ValueError:
        return 0
