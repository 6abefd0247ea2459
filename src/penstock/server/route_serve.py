"""A running router: its port, its engines, signals, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable

from penstock.cluster.dispatcher import Dispatcher
from penstock.config.route import RouteOptions
from penstock.config.schema import ServerOptions
from penstock.server.http_server import Http, make_http, server_url
from penstock.server.route import RouterApp
from penstock.server.route_engines import RemoteEngines
from penstock.server.route_prompts import Prompts

log = logging.getLogger("penstock.route")

LOOK_S = 0.05


def run_router(
    options: ServerOptions,
    route: RouteOptions,
    dispatcher: Dispatcher,
    prompts: Prompts,
    sock: socket.socket,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Route until a signal; the exit code. Engines may come and go meanwhile, also all of them. Closes `sock`.

    Raises ConfigError for a certificate or an engine's URL that cannot be used.
    """
    try:
        engines = RemoteEngines(route, dispatcher)
        router = RouterApp(options, dispatcher, engines, prompts)
        http = make_http(router.app(), options)
        with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
            return runner.run(_run(options, engines, router, http, sock, on_ready))
    finally:
        prompts.close()
        sock.close()


async def _run(
    options: ServerOptions,
    engines: RemoteEngines,
    router: RouterApp,
    http: Http,
    sock: socket.socket,
    on_ready: Callable[[str], None] | None,
) -> int:
    loop = asyncio.get_running_loop()
    asked_to_stop = asyncio.Event()

    def signalled(number: int) -> None:
        """First signal: drain. Second: leave at once."""
        if asked_to_stop.is_set():
            os._exit(128 + number)
        asked_to_stop.set()
        log.warning("shutting down: running requests have %g s to finish", options.shutdown_timeout)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, signalled, number)
    engines.start()
    serving = asyncio.ensure_future(http.serve(sockets=[sock]))
    try:
        while not http.started and not serving.done():
            await asyncio.sleep(0.005)
        if on_ready is not None:
            on_ready(server_url(options, sock))
        await asyncio.wait({asyncio.ensure_future(asked_to_stop.wait()), serving}, return_when=asyncio.FIRST_COMPLETED)
        router.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(options.shutdown_timeout):
                while router.num_live:
                    await asyncio.sleep(LOOK_S)
        return 0
    finally:
        http.should_exit = True
        await serving
        await engines.stop()
