"""Many engines as processes that die: started again within limits, given up after that. The processes are pretended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from tests.fakes.placement import LeastLoaded

from penstock.cluster import restarts
from penstock.cluster.beats import Silences
from penstock.cluster.restarts import Restarts
from penstock.cluster.router import Router
from penstock.engine.messages import Drain, Fatal, Peer, Peers, Ready, Stopped, Watch
from penstock.engine.wire import ZmqWire, dial
from penstock.server.backend import ManyEngines

ROLES = {"prefill-0": "prefill", "decode-0": "decode"}


class Pretended:
    """An engine's process and its end of the wire."""

    def __init__(self, name: str, address: str) -> None:
        self.wire: ZmqWire = dial(address)
        self.code: int | None = None
        self.is_hung = False
        self.wire.send(Ready("m", 64, 32, 9, 4, "cpu", [], [], Peer(name, ROLES[name], f"w:{name}", f"l:{name}")))

    def poll(self) -> int | None:
        return self.code

    def has_beaten(self) -> bool:
        return not self.is_hung

    def kill(self) -> None:
        self.end(-9)

    def end(self, code: int) -> None:
        self.code = code
        self.wire.close(1.0)


class Stage:
    """The backend with its engines, and what its front end is told."""

    def __init__(self, max_restarts: int, hang_s: float = 0.0) -> None:
        self.alive: dict[str, Pretended] = {}
        self.told: list[Any] = []
        self.num_launched = 0
        self.broken = 0  # launches that fail
        router = Router(ROLES, LeastLoaded(ROLES))
        self.backend = ManyEngines(router, self.launch, Restarts(max_restarts), Silences(hang_s))

    def launch(self, name: str, address: str) -> Pretended:
        self.num_launched += 1
        if self.broken:
            self.broken -= 1
            raise OSError("no more processes")
        self.alive[name] = Pretended(name, address)
        return self.alive[name]

    async def until(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(20):
            while not condition():
                self.backend.poll()
                await asyncio.sleep(0.005)
        return condition()

    async def hears(self, name: str, kind: type) -> Any:
        found: list[Any] = []

        def look() -> bool:
            found.extend(m for m in self.alive[name].wire.receive() if isinstance(m, kind))
            return bool(found)

        await self.until(look)
        return found[-1]


def play(script: Callable[[Stage], Any], max_restarts: int = 3, hang_s: float = 0.0) -> None:
    async def run() -> None:
        stage = Stage(max_restarts, hang_s)
        stage.backend.open(asyncio.get_running_loop(), lambda messages: stage.told.extend(messages))
        try:
            stage.backend.launch()
            await stage.until(lambda: [m for m in stage.told if isinstance(m, Ready)])
            await script(stage)
        finally:
            stage.backend.hush()
            stage.backend.kill()
            stage.backend.close(0.0)

    asyncio.run(run())


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_S", 0.01)


def test_it_is_started_again_and_its_peers_hear_of_it(caplog: pytest.LogCaptureFixture) -> None:
    async def script(stage: Stage) -> None:
        for code in (-9, 1):
            first = stage.alive["decode-0"]
            await stage.hears("prefill-0", Peers)
            first.end(code)
            await stage.until(lambda first=first: stage.alive["decode-0"] is not first)
            peers = await stage.hears("decode-0", Peers)
            assert {peer.name for peer in peers.peers} == set(ROLES)
            assert stage.backend.poll() is None
        stage.backend.send(Watch(1e9, 1.0))
        await stage.hears("decode-0", Watch)
        assert not stage.backend.is_full
        assert len([m for m in stage.told if isinstance(m, Ready)]) == 1

    with caplog.at_level(logging.INFO, "penstock.server"):
        play(script)
    assert [record.message for record in caplog.records] == [
        "engine decode-0: its process ended with SIGKILL; it is started again",
        "engine decode-0 is back",
        "engine decode-0: its process ended with exit code 1; it is started again",
        "engine decode-0 is back",
    ]


def test_one_that_hangs_is_killed_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def script(stage: Stage) -> None:
        first = stage.alive["decode-0"]
        first.is_hung = True
        await stage.until(lambda: stage.alive["decode-0"] is not first)
        assert first.code == -9 and stage.alive["prefill-0"].code is None
        await stage.hears("decode-0", Peers)

    with caplog.at_level(logging.INFO, "penstock.server"):
        play(script, hang_s=0.1)
    assert [record.message for record in caplog.records] == [
        "engine decode-0: it hangs: nothing was heard of it for 0.1 s, it was killed; it is started again",
        "engine decode-0 is back",
    ]


def test_in_its_own_words_and_within_limits(caplog: pytest.LogCaptureFixture) -> None:
    async def script(stage: Stage) -> None:
        stage.broken = 10
        stage.alive["decode-0"].wire.send(Fatal("out of memory"))
        stage.alive["decode-0"].end(1)
        fatal = await stage.until(lambda: [m for m in stage.told if isinstance(m, Fatal)])
        assert fatal == [Fatal("engine decode-0: cannot be started: no more processes")]
        assert stage.num_launched == 2 + 3
        stage.alive["prefill-0"].end(1)
        assert await stage.until(stage.backend.poll) == 1

    play(script)
    assert caplog.records[0].message == "engine decode-0: out of memory; it is started again"


def test_nothing_is_started_while_the_server_drains() -> None:
    async def script(stage: Stage) -> None:
        stage.backend.send(Drain(1e9))
        await stage.hears("decode-0", Drain)
        stage.alive["decode-0"].wire.send(Stopped())
        stage.alive["decode-0"].end(0)
        await stage.hears("prefill-0", Drain)
        stage.alive["prefill-0"].end(-9)
        assert await stage.until(lambda: stage.backend.poll() is not None)
        assert stage.num_launched == 2
        assert any(isinstance(m, Stopped | Fatal) for m in stage.told)

    play(script)
