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

from penstock.cluster.pool import HELLO_S, PoolGone, PoolWire

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
    """Engines that it had compute on; those that are started again find a new one."""
    prompt = list(range(100, 500))
    flags = ("-dp", "2", "--kv-cache-memory-bytes", "8M", "--kv-offloading-size", "64M", "--disable-log-stats")
    with RealServer(*flags) as server:
        server.until_ready()

        def text() -> str:
            answer = server.complete(prompt, max_tokens=8, temperature=0)
            return str(answer["choices"][0]["text"])

        expected = text()
        [pool] = [pid for pid in server.children() if "penstock.build.pool_process" in command_of(pid)]
        os.kill(pool, signal.SIGKILL)
        before = engine_pids(server)
        assert len(before) == 2
        for name, pid in before.items():
            os.kill(pid, signal.SIGKILL)
            until(lambda name=name, pid=pid: engine_pids(server).get(name, pid) != pid, 30.0)
            assert text() == expected

        def has_tiers() -> bool:
            lines = server.http.get("/metrics").text.splitlines()
            on = [line for line in lines if line.startswith("penstock:tier_on{") and 'tier="host"' in line]
            return len(on) == 2 and all(line.endswith(" 1.0") for line in on)

        until(has_tiers, 60.0, "both engines in the new pool")
        for _ in range(4):
            assert text() == expected
        assert server.errors().count("it is started again") >= 3  # the pool, and each engine
        assert "goes on without KV tiers" not in server.errors()


def test_an_engine_whose_pool_does_not_come_back_goes_on_without(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "pool"))  # and nobody listens
    line = PoolWire(str(tmp_path))
    begin = time.monotonic()
    with pytest.raises(PoolGone, match="has ended"):
        line.hello(ONE)
    assert time.monotonic() - begin < HELLO_S / 2
    line.close()
