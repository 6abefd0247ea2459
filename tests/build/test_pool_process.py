"""The process that keeps a machine's pool alive: started again when it ends, not too often, and not after `close`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from penstock.build import launch
from penstock.build.launch import PoolProcess
from penstock.config.load import resolve

ENDS, STAYS = "", "import sys; sys.stdin.read()"


class Started(PoolProcess):
    """Runs small programs in place of pools: the next of `programs`, or what raises."""

    def __init__(self, *programs: str | OSError) -> None:
        self.programs, self.times = list(programs), []
        super().__init__(resolve({"kv_offloading_size": "4M"}, environ={}), "/nowhere")

    def _start(self) -> subprocess.Popen[bytes]:
        self.times.append(time.monotonic())
        program = self.programs.pop(0)
        if isinstance(program, OSError):
            raise program
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_is_started_again_at_a_pace(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(launch, "POOL_LIFE_S", 0.3)
    pool = Started(ENDS, ENDS, OSError("out of memory"), STAYS)
    until(lambda: not pool.programs)
    pool.close()
    assert all(later - earlier > 0.25 for earlier, later in zip(pool.times, pool.times[1:], strict=False))
    assert caplog.text.count("has ended (exit code 0)") == 2 and caplog.text.count("out of memory") == 1
    assert pool._process.wait(10) == 0


def test_nothing_is_started_after_close(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(launch, "POOL_LIFE_S", 0.2)
    stays, ended = Started(STAYS, STAYS), Started(ENDS, STAYS)
    ended._process.wait(20)
    ended.close()
    assert "has ended" not in caplog.text or len(ended.times) == 1
    stays.close()
    time.sleep(0.5)
    assert len(stays.times) == len(ended.times) == 1
