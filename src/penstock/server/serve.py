"""A running server: the port, the engine's process, signals, and the order in which all of it starts and stops.

HTTP answers from the first moment; the model's texts load in a thread and the engine in its process meanwhile. Does not
know what an engine is made of: it gets a function that launches one and hears from it over the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.config.schema import Config
from penstock.config.values import ConfigError
from penstock.core.request import SamplingParams
from penstock.engine.garbage import rare_collections
from penstock.engine.messages import Ready, Report
from penstock.engine.tokenizer import Tokenizer
from penstock.server import live
from penstock.server.app import create_app
from penstock.server.backend import Backend
from penstock.server.chat import ChatRenderer, chosen_templates
from penstock.server.http_server import make_http, server_url
from penstock.server.live import Live
from penstock.server.metrics import Metrics
from penstock.server.port import listening_socket
from penstock.server.state import Served, ServerState

log = logging.getLogger("penstock.server")

LOOK_S = 0.1  # how often the engine's process is looked at
KEEP_ALIVE_LOOK_S = 5.0
STATS_S = 10.0
ENGINE_EXIT_S = 5.0  # for the engine to leave after its last word, and again after it was killed
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


def served_model(config: Config, directory: Path, tokenizer: Tokenizer, vocab_size: int) -> Served:
    """What clients see of a model in `directory`: its names, chat templates and sampling defaults.

    Compiles the chat templates, in their worker. Raises ChatError for a template that cannot work.
    """
    templates = chosen_templates(tokenizer.chat_templates, config.model.chat_template)
    trusted = config.model.trust_request_chat_template
    chat = ChatRenderer(templates, tokenizer.special_tokens, trust_request_chat_template=trusted)
    try:
        chat.check()
    except BaseException:
        chat.close()
        raise
    defaults = sampling_defaults(directory) if config.model.generation_config == "auto" else {}
    return Served(model_names(config), config.model.model, tokenizer, chat, vocab_size, defaults)


def model_names(config: Config) -> tuple[str, ...]:
    """What requests may call the model."""
    return config.model.served_model_name or (config.model.model,)


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """The checkpoint's own sampling defaults: numbers of generation_config.json that requests may override.

    Raises ConfigError for a file that no request could run with: its sender would be blamed for it.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it does not hold an object")
        found = {name: raw[name] for name in DEFAULTS if raw.get(name) is not None}
        if raw.get("do_sample") is False:
            found.pop("temperature", None)  # it says nothing there; a request without one still samples, as in vLLM
        wrong = next((name for name, value in found.items() if type(value) not in (int, float)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} must be a number, got {found[wrong]!r}")
        names = {"max_new_tokens": "max_tokens"}
        SamplingParams(**{names.get(name, name): value for name, value in found.items()}).check()
    except (OSError, ValueError, TypeError) as error:
        message = f"{path}: {error}; --generation-config vllm does without the file"
        raise ConfigError(message, "--generation-config") from None
    return found


def run_server(
    config: Config,
    backend: Backend,
    load: Callable[[], Served],
    *,
    on_ready: Callable[[Ready, str], None] | None = None,
    sock: socket.socket | None = None,
) -> int:
    """Serve until a signal or the engine's death; the process's exit code.

    `backend` is launched once HTTP answers, in this thread, and closed here. `load()` reads the model's texts, in
    another thread; an exception of either ends the server with one line. `on_ready` gets the engine's Ready and the
    server's URL. `sock`: of `listening_socket`; it is closed here. Raises ConfigError for a port or certificate that
    cannot be used, before anything else happens.
    """
    sock = sock or listening_socket(config.server)
    try:
        server = _Server(config, sock, backend, load, on_ready)
        with asyncio.Runner(loop_factory=server.http.config.get_loop_factory()) as runner:
            return runner.run(server.run())
    finally:
        sock.close()


class _Server:
    """One run of `run_server`."""

    def __init__(
        self,
        config: Config,
        sock: socket.socket,
        backend: Backend,
        load: Callable[[], Served],
        on_ready: Callable[[Ready, str], None] | None,
    ) -> None:
        options = config.server
        self.config, self.sock = config, sock
        self.backend, self.load = backend, load
        self.on_ready = on_ready or _log_ready
        name = model_names(config)[0]
        prefix, roles = options.metrics_prefix, backend.roles
        self.metrics = Metrics(name, config.cache, prefix, engine_of=backend.engine_of, roles=roles)
        self.live = Live(config, name, backend.send, routes=backend)
        self.state = ServerState(
            options,
            backend.send,
            observers=(self.metrics, self.live),
            seeds=_seeds(config),
            is_clogged=lambda: backend.is_full,
            explain_route=backend.explain_route,
            cluster=config.cluster,
        )
        app = create_app(
            self.state,
            extra_routes=self.live.routes(),
            open_prefixes=live.OPEN_PREFIXES,
            render_metrics=self.metrics.render,
        )
        self.http = make_http(app, options)
        self.url = server_url(options, sock)
        self.loading: asyncio.Future[Served] | None = None
        self.deadline_s: float | None = None  # set while draining
        self._has_served = False  # requests could be running when draining began
        self.num_signals = 0
        self._meanwhile = contextlib.ExitStack()  # how this process collects garbage while it serves
        self._is_launched = False
        self._has_exited = False  # the engine's process was seen to be gone

    # ---- run ----

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._signalled, number)
        self.backend.open(loop, self.state.dispatch)
        serving = asyncio.ensure_future(self.http.serve(sockets=[self.sock]))
        self.live.start()
        try:
            while not self.http.started and not serving.done():
                await asyncio.sleep(0.005)
            with self._meanwhile:
                return await self._supervise()
        finally:
            await self.live.stop()
            self.http.should_exit = True
            await serving
            await self._close_texts()
            self.backend.hush()
            await self._end_engine()
            self.backend.close(0.5)

    async def _supervise(self) -> int:
        """Start the engine and the texts, then look after them until there is a reason to stop: the exit code."""
        try:
            self.backend.launch()
            self._is_launched = True
        except Exception as error:
            return self._fatal(error)
        self.loading = asyncio.ensure_future(asyncio.to_thread(self.load))
        is_open = is_told = False
        next_keep_alive_s = next_stats_s = time.monotonic()
        stats = Stats()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if self.loading.done() and not is_open:
                try:
                    self.state.open(self.loading.result())
                except Exception as error:
                    return self._fatal(error)
                is_open = True
                gc.collect()
                gc.freeze()  # all that was loaded stays: no collection needs to walk it
                self._meanwhile.enter_context(rare_collections())
                self._meanwhile.callback(gc.unfreeze)
            if is_open and not is_told and self.state.phase == "ready":
                is_told = True
                assert self.state.front.ready is not None
                self.on_ready(self.state.front.ready, self.url)
            if now >= next_keep_alive_s:
                next_keep_alive_s = now + KEEP_ALIVE_LOOK_S
                self.state.keep_alive()
            if now >= next_stats_s:
                next_stats_s = now + STATS_S
                if is_told and not self.config.server.disable_log_stats:
                    stats.log(self.state.front.report)
            code = self._exit_code(is_told, now)
            if code is not None:
                return code

    def _exit_code(self, is_told: bool, now: float) -> int | None:
        """None while there is no reason to stop."""
        if self.deadline_s is not None and (not self._has_served or self.state.phase == "stopped"):
            return 0  # nothing was running yet, or everything has ended
        code = self.backend.poll()
        if code is not None and not self._has_exited:
            self._has_exited = True  # its last words may still be on the wire: look again
            return None
        if code == 0 and self.deadline_s is not None:
            return 0
        if self.state.phase == "dead" or code is not None:
            if code is not None and self.state.phase != "dead":
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                self.state.engine_lost(f"its process ended with {how}")
            what = "died" if is_told else "could not start"
            log.error("the engine %s: %s", what, self.state.dead_reason)
            return 1
        if self.deadline_s is not None and now > self.deadline_s + ENGINE_EXIT_S:
            log.error("the engine did not drain in time; it is killed")
            self.state.engine_lost("it did not drain in time")
            return 1
        return None

    def _fatal(self, error: Exception) -> int:
        """Start-up failed: one line, and nobody is left waiting."""
        self.state.engine_lost(str(error))
        log.error("%s", error, exc_info=None if isinstance(error, ValueError) else error)
        return 1

    # ---- stop ----

    def _signalled(self, number: int) -> None:
        """First signal: drain. Second: leave at once."""
        self.num_signals += 1
        if self.num_signals > 1:
            self.backend.kill()
            self.backend.close(0.0)
            os._exit(128 + number)
        timeout_s = self.config.server.shutdown_timeout
        log.warning(
            "shutting down: running requests have %g s to finish; once more kills at once (%s)",
            timeout_s, signal.Signals(number).name,
        )  # fmt: skip
        self.deadline_s = time.monotonic() + timeout_s
        self._has_served = self.state.phase == "ready"
        self.state.drain(self.deadline_s)
        self._bye = asyncio.ensure_future(self.live.stop())

    async def _close_texts(self) -> None:
        """End the template workers, also of texts that came too late."""
        if self.loading is not None:
            with contextlib.suppress(Exception):
                (await self.loading).chat.close()
        self.state.close()

    async def _end_engine(self) -> None:
        """The engine leaves by itself after its last word; else it is told to, then made to."""
        if not self._is_launched:
            return
        grace_s = ENGINE_EXIT_S if self.state.phase == "stopped" else 0.0
        for end, wait_s in ((None, grace_s), (self.backend.kill, ENGINE_EXIT_S)):
            if end is not None:
                end()
            until_s = time.monotonic() + wait_s
            while time.monotonic() < until_s and self.backend.poll() is None:
                await asyncio.sleep(0.02)
            if self.backend.poll() is not None:
                return


def _seeds(config: Config) -> Callable[[], int] | None:
    """With --seed, requests without a seed get the numbers from it on, in order of arrival; else random ones."""
    if config.origins.get("seed", ("default", ""))[0] == "default":
        return None
    numbers = itertools.count(config.model.seed)
    return lambda: next(numbers)


def _log_ready(ready: Ready, url: str) -> None:
    log.info("%s is ready at %s (page: /, API: /v1)", ready.model_id, url)


class Stats:
    """One log line per interval in which something was computed."""

    def __init__(self) -> None:
        self._before: Report | None = None

    def log(self, report: Report | None) -> None:
        """The rates since the report of the last call."""
        before, self._before = self._before, report
        if report is None or before is None or report.num_steps_total == before.num_steps_total:
            return
        seconds = max(report.now_s - before.now_s, 1e-9)
        num_queried = report.prefix_queries_total - before.prefix_queries_total
        num_hit = report.prefix_hits_total - before.prefix_hits_total
        kv = report.kv
        log.info(
            "prompt %.1f tokens/s, output %.1f tokens/s, running %d, waiting %d, KV cache %.1f %%, prefix hits %.1f %%",
            (report.prompt_tokens_total - before.prompt_tokens_total) / seconds,
            (report.generation_tokens_total - before.generation_tokens_total) / seconds,
            report.num_running,
            report.num_waiting,
            100 * (kv.used + kv.shared + kv.filling) / max(kv.num_blocks, 1),
            100 * num_hit / num_queried if num_queried else 0.0,
        )
