"""A real server on a free port of 127.0.0.1 with a scripted engine at the other end of a real zmq wire."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import httpx
import openai
import uvicorn
from tests.server.scripted_engine import ScriptedEngine, drive
from tests.server.tiny_model import MODEL, tiny_served

from penstock.config.schema import Config, ServerOptions
from penstock.engine.wire import LoopWire, listen
from penstock.server.app import create_app
from penstock.server.live import Live
from penstock.server.metrics import Metrics
from penstock.server.state import ServerState

Result = TypeVar("Result")


class RunningServer:
    """Context manager: HTTP in one thread, the engine in another. `on_loop` runs a function in the server's loop."""

    def __init__(
        self, options: ServerOptions | None = None, engine: ScriptedEngine | None = None, **served: Any
    ) -> None:
        self.options = options or ServerOptions()
        self.engine = engine or ScriptedEngine()
        self.served = tiny_served(**served)
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.step_s = 0.001
        self._stop_engine = threading.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> RunningServer:
        self._thread.start()
        assert self._up.wait(30), "the server did not start"
        self.start_engine()
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.until(lambda: self.http.get("/health").status_code == 200)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.http.close()
        self._stop_engine.set()
        self._engine_thread.join(10)
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    def start_engine(self) -> None:
        self._engine_thread = threading.Thread(
            target=drive, args=(self.engine, self.wire.address, self._stop_engine, self.step_s), daemon=True
        )
        self._engine_thread.start()

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30, **options)

    def on_loop(self, function: Callable[[], Result]) -> Result:
        done: list[Result] = []
        event = threading.Event()

        def run() -> None:
            done.append(function())
            event.set()

        self.loop.call_soon_threadsafe(run)
        assert event.wait(10)
        return done[0]

    @staticmethod
    def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
        """Wait for a condition; the seconds that it took."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < timeout_s, "it did not happen in time"
            time.sleep(0.002)
        return time.monotonic() - begin

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.wire = listen()
        sent: list[LoopWire] = []
        self.metrics = Metrics(MODEL, Config().cache)
        self.live = Live(Config(), MODEL, lambda message: sent[0].send(message))
        self.state = ServerState(
            self.options, lambda message: sent[0].send(message), observers=(self.metrics, self.live)
        )
        app = create_app(
            self.state, extra_routes=self.live.routes(), open_prefixes=("/page/",), render_metrics=self.metrics.render
        )
        config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        sent.append(LoopWire(self.wire, self.loop, self.state.dispatch))
        self.live.start()
        serving = asyncio.ensure_future(server.serve(sockets=[self.sock]))
        while not server.started:
            await asyncio.sleep(0.001)
        self.state.open(self.served)
        self._up.set()
        await self._stop.wait()
        await self.live.stop()
        server.should_exit = True
        await asyncio.wait_for(serving, 10)
        sent[0].close()
        self.state.close()
        self.served.chat.close()
        self.wire.close(0.0)


def assert_error(response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """The response is an error in OpenAI's shape; its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return str(error["message"])
