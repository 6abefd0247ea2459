"""Two servers, each with host memory, that name each other's pools: what one computed the other loads, also behind a
router; and when one is killed the other goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from tests.e2e.pd import prompt
from tests.e2e.serving import MODEL, RealServer, until
from tests.ports import free_port

NUM_TOKENS = 1000
MAX_TRIES = 8
TELL_ROUNDS = 5  # of 0.3 s: a pool tells how full it is every second
FLAGS = (
    "--kv-cache-memory-bytes", "32M", "--kv-offloading-size", "64M", "--disable-log-stats", "--generation-config",
    "vllm", "--cluster-secret", "between us",
)  # fmt: skip


class Engine(RealServer):
    """A server whose pool listens at `mine` and reads at `other`, and which publishes its cache's events."""

    def __init__(self, mine: int, other: int) -> None:
        self.events, self.replay = free_port(), free_port()
        settings = {
            "enable_kv_cache_events": True,
            "endpoint": f"tcp://127.0.0.1:{self.events}",
            "replay_endpoint": f"tcp://127.0.0.1:{self.replay}",
        }
        pools = ("--kv-pool-listen", f"127.0.0.1:{mine}", "--kv-remote-url", f"penstock://127.0.0.1:{other}")
        super().__init__(*FLAGS, *pools, "--kv-events-config", json.dumps(settings))

    @property
    def name(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def told(self) -> str:
        return f"{self.url},events=tcp://127.0.0.1:{self.events},replay=tcp://127.0.0.1:{self.replay}"

    def number(self, name: str, tier: str) -> float:
        """A metric of one of its tiers."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"penstock:tier_{name}{{") and f'tier="{tier}"' in line:
                return float(line.rpartition(" ")[2])
        return 0.0

    def used(self) -> float:
        """Blocks in its host memory, when they have become no more for longer than its pool takes to tell of them."""
        seen = [-1.0]

        def is_quiet() -> bool:
            time.sleep(0.3)
            seen.append(self.number("used_blocks", "host"))
            return len(set(seen[-TELL_ROUNDS:])) == 1

        until(is_quiet, what="saving")
        return seen[-1]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Engine, Engine]]:
    first, second = free_port(), free_port()
    with ExitStack() as stack:
        a, b = (stack.enter_context(Engine(*ports)) for ports in ((first, second), (second, first)))
        for server in (a, b):
            server.until_ready()
        yield a, b


def body(token_ids: list[int], **fields: Any) -> dict[str, Any]:
    return {
        "prompt": token_ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields,
    }  # fmt: skip


def ask(server: RealServer, token_ids: list[int], **fields: Any) -> tuple[list[int], int]:
    """(tokens, prompt tokens that came from caches)."""
    response = server.post("/v1/completions", body(token_ids, **fields))
    assert response.status_code == 200, response.text
    told = response.json()
    return told["choices"][0]["token_ids"], told["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_what_one_computed_the_other_loads(pair: tuple[Engine, Engine]) -> None:
    """Both ways. Recomputing (another salt: another cache) gives the same tokens, and has nothing from elsewhere.

    A request waits a bounded time for its load and computes when a busy machine makes it late: then another prompt.
    """
    for (one, other), first in ((pair, 1), (pair[::-1], 1 + MAX_TRIES)):
        for number in range(first, first + MAX_TRIES):
            asked = prompt(NUM_TOKENS, number)
            before, hits = one.used(), other.number("hit_blocks_total", "remote")
            computed, cached = ask(one, asked)
            assert cached == 0
            saved = before + NUM_TOKENS // 32
            until(lambda saved=saved, one=one: one.number("used_blocks", "host") == saved, what="saving")
            tokens, cached = ask(other, asked)
            assert tokens == computed
            assert ask(other, asked, cache_salt=f"salt {number}") == (computed, 0)
            hits += cached // 32
            until(lambda hits=hits, other=other: other.number("hit_blocks_total", "remote") == hits, what="telling")
            if cached == NUM_TOKENS // 32 * 32:
                break
        else:
            pytest.fail(f"none of {MAX_TRIES} prompts was loaded")


def test_a_hot_prefix_is_copied_behind_a_router(pair: tuple[Engine, Engine]) -> None:
    """The router knows that one can read what the other holds: it sends requests there, which load the prefix. (Or
    compute it, where a busy machine makes the load late: then another prefix.)"""
    with RealServer(
        "--model", MODEL, "--engine", pair[0].told, "--engine", pair[1].told, "--health-interval", "0.2", model="",
        verb="route",
    ) as router:  # fmt: skip
        router.until_ready()
        until(
            lambda: sum(e["is_up"] for e in router.http.get("/health").json()["engines"].values()) == 2,
            what="meeting both engines",
        )
        assert any(try_hot_prefix(router, pair, 100 * number) for number in range(1, 1 + MAX_TRIES))


def try_hot_prefix(router: RealServer, pair: tuple[Engine, Engine], seed: int) -> bool:
    """One request computes a prefix, then twelve at once begin with it: has a copy been predicted, and made?"""
    prefix = prompt(NUM_TOKENS, seed)
    ask(router, prefix)
    holder = router.http.get("/routes/recent").json()["routes"][0]["engine"]
    other = pair[0] if pair[1].name == holder else pair[1]
    for engine in pair:
        engine.used()
    hits = other.number("hit_blocks_total", "remote")
    tails = [prefix + prompt(64, seed + number) for number in range(1, 13)]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda tail: ask(router, tail)[0], tails))
    routes = router.http.get("/routes/recent").json()["routes"][:12]
    copies = [route for route in routes if route["engine"] == other.name and route["terms"]["load"] > 0]
    assert all(route["hit_tokens"] >= NUM_TOKENS // 32 * 32 for route in copies)
    other.used()
    has_loaded = other.number("hit_blocks_total", "remote") >= hits + NUM_TOKENS // 32
    assert answers == [ask(pair[0], tail, cache_salt="alone")[0] for tail in tails]
    return bool(copies) and has_loaded


def test_the_other_goes_on_when_one_is_killed(pair: tuple[Engine, Engine]) -> None:
    a, b = pair
    asked = prompt(NUM_TOKENS, 2000)
    expected, _ = ask(b, asked, cache_salt="alone")
    ask(a, asked)
    for pid in (*a.children(), a.process.pid):
        os.kill(pid, signal.SIGKILL)
    a.process.wait(10)
    for number in range(3):
        tokens, cached = ask(b, prompt(NUM_TOKENS, 2001 + number))
        assert cached == 0 and len(tokens) == 8
    assert ask(b, asked) == (expected, 0)
    lines = [line for line in b.errors().splitlines() if "tier remote" in line]
    assert len(lines) == 1 and "tried again in" in lines[0], lines
    b.until_idle()
