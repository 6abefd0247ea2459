"""Engines behind one router that share a pool of KV tiers: the router counts on what only the pool still has."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from tests.e2e.pd import engine_pids
from tests.e2e.serving import RealServer, until
from tests.tiers.tier_blocks import ONE

from penstock.cluster import pool
from penstock.cluster.pool import PoolWire

TOKENS, BLOCK = 1024, 32
HIT = TOKENS - BLOCK  # the last block's last token is computed, and so its block


def command_of(pid: int) -> list[str]:
    """Its words; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    except OSError:
        return []


def test_a_prompt_that_only_the_pool_holds_is_predicted_as_a_load_and_is_one() -> None:
    """More prompts than two devices hold: the first are in the pool alone, and the router says so before they come."""
    draw = random.Random(5)
    prompts = [[draw.randrange(16, 8000) for _ in range(TOKENS)] for _ in range(12)]
    flags = ("-dp", "2", "--kv-cache-memory-bytes", "8M", "--kv-offloading-size", "128M", "--disable-log-stats")
    with RealServer(*flags) as server:
        server.until_ready()

        def asked(prompt: list[int]) -> tuple[int, dict[str, float], int]:
            """(tokens that were cached, the terms that the router saw, tokens that it expected to be cached)."""
            answer = server.complete(prompt, max_tokens=1, temperature=0)
            (route, *_) = server.http.get("/routes/recent").json()["routes"]
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"], route["terms"], route["hit_tokens"]

        for prompt in prompts:
            assert asked(prompt)[0] == 0
        # Saves are told of when they are done. A prompt that is asked for moves up, so the next is the oldest.
        told = until(lambda: next((found for found in map(asked, prompts) if found[1]["load"] > 0), None), 60.0)
        cached, terms, hit = told
        assert hit == cached == HIT
        assert terms["load"] < 1000 and terms["prefill"] < 1000


def test_a_pool_that_dies_takes_no_engine_with_it() -> None:
    """Engines compute on, and join the one that is started in its place: that of before, and one that died as well."""
    prompt = list(range(100, 500))
    flags = ("-dp", "2", "--kv-cache-memory-bytes", "8M", "--kv-offloading-size", "64M", "--disable-log-stats")
    with RealServer(*flags) as server:
        server.until_ready()

        def text() -> str:
            answer = server.complete(prompt, max_tokens=8, temperature=0)
            return str(answer["choices"][0]["text"])

        def tiers(name: str) -> list[float]:
            """A metric of host memory, of each engine."""
            lines = server.http.get("/metrics").text.splitlines()
            found = [line for line in lines if line.startswith(f"penstock:tier_{name}{{") and 'tier="host"' in line]
            return [float(line.rpartition(" ")[2]) for line in found]

        expected = text()
        until(lambda: tiers("used_blocks") == [len(prompt) // 32] * 2, what="saving")
        [pool_pid] = [pid for pid in server.children() if "penstock.build.pool_process" in command_of(pid)]
        os.kill(pool_pid, signal.SIGKILL)
        (name, pid), _ = engine_pids(server).items()
        os.kill(pid, signal.SIGKILL)
        until(lambda: engine_pids(server).get(name, pid) != pid, 30.0)
        assert text() == expected
        until(lambda: tiers("on") == [1.0] * 2 and "the pool of KV tiers is back" in server.errors(), 60.0, "joining")
        draw = random.Random(7)
        others = [[draw.randrange(16, 8000) for _ in range(TOKENS)] for _ in range(2)]
        for other in others:
            server.complete(other, max_tokens=1, temperature=0)
        until(lambda: min(tiers("used_blocks")) >= 2 * HIT // 32, what="saving in the new pool")
        assert text() == expected
        assert server.errors().count("it is started again") == 2
        assert "goes on without KV tiers" not in server.errors()


def test_an_engine_whose_pool_does_not_come_back_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "pool"))  # and nobody listens
    line = PoolWire(str(tmp_path), ONE)
    monkeypatch.setattr(pool, "DEAD_S", 0.5)
    begin = time.monotonic()
    with pytest.raises(pool.PoolGone, match="has ended"):
        line.join()
    assert time.monotonic() - begin < pool.HELLO_S / 2
    line.close()
