"""Prefill and decode in processes of their own: whatever is asked, the answer is that of one engine.

E0 with native kernels, whatever the link, the mode, the model and the chunks; E1 in plain torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.pd import COMMON, KV_BYTES, Answer, Asked, Reference, ask, asked, handoffs, mistral, prompt
from tests.e2e.serving import MODEL, RealServer, streaming, until

from penstock.nn.kernels.native import usable_kernels

LINKS = {
    "shm": ("--kv-link", "shm"),
    "tcp, layer by layer": ("--kv-link", "tcp", "--kv-link-mode", "layerwise"),
    "shm, whole": ("--kv-link", "shm", "--kv-link-mode", "whole"),
    "tcp": ("--kv-link", "tcp"),
}


@dataclass(frozen=True)
class Setup:
    """What is served, and how exactly its answers are known. `settings` are flags as `LLM` calls them."""

    link: str
    is_window: bool = False
    is_exact: bool = True
    settings: tuple[tuple[str, str], ...] = ()


SETUPS = {
    "shm": Setup("shm"),
    "tcp-layerwise-int8": Setup("tcp, layer by layer", settings=(("kv_cache_dtype", "int8"),)),
    "shm-whole-window": Setup("shm, whole", is_window=True),
    "tcp-torch-window": Setup(
        "tcp", is_window=True, is_exact=False, settings=(("cpu_kernels", "torch"), ("dtype", "float32"))
    ),
}


@dataclass(frozen=True)
class Pair:
    """A server with prefill and decode apart, and one engine that does both."""

    server: RealServer
    one: Reference
    is_exact: bool

    def same(self, found: list[Answer], request: Asked) -> None:
        expected = self.one.answers(request)
        if self.is_exact:
            assert found == expected
            return
        assert [(a.token_ids, a.text, a.finish_reason) for a in found] == [
            (a.token_ids, a.text, a.finish_reason) for a in expected
        ]
        for mine, theirs in zip(found, expected):
            assert mine.logprobs == (None if theirs.logprobs is None else pytest.approx(theirs.logprobs, abs=1e-3))

    def check(self, request: Asked) -> None:
        self.same(ask(self.server, request), request)


@pytest.fixture(scope="module", params=SETUPS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    setup = SETUPS[request.param]
    if setup.is_exact and not usable_kernels():
        pytest.skip("bit-equal with native kernels only")
    settings: dict[str, Any] = dict(setup.settings)
    model: str | Path = MODEL
    if setup.is_window:
        model, settings["load_format"] = mistral(tmp_path_factory.mktemp("mistral")), "dummy"
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    arguments = ("--pd", "1P1D", *COMMON, *LINKS[setup.link], "--kv-cache-memory-bytes", KV_BYTES, *flags)
    with RealServer(*arguments, model=str(model)) as server:
        one = Reference(model, **settings)
        yield Pair(server.until_ready(), one, setup.is_exact)
        server.until_idle()
        one.close()
        assert handoffs(server)["failed"] == 0
        assert server.errors() == ""


def test_prompts_in_many_chunks(pair: Pair) -> None:
    before = handoffs(pair.server)["received"]
    lengths = (65, 128, 129, 352, 640, 1500)
    for seed, num_tokens in enumerate(lengths):
        pair.check(asked(num_tokens, seed))
    pair.check(asked(20, 50))  # too short for a hand-off
    until(lambda: handoffs(pair.server)["received"] == before + len(lengths), what="counting all hand-offs")


def test_everything_that_may_be_asked(pair: Pair) -> None:
    pair.check(asked(300, 10, logprobs=3))
    pair.check(asked(400, 11, prompt_logprobs=1, logprobs=1))
    pair.check(asked(500, 12, n=3, temperature=0.9, seed=11))
    pair.check(asked(600, 13, temperature=1.0, top_p=0.9, top_k=40, seed=3))
    pair.check(asked(700, 14, presence_penalty=0.5, repetition_penalty=1.2))
    for num_tokens in (64, 65, 96, 800):
        pair.check(asked(num_tokens, 15, max_tokens=1))
    [whole] = pair.one.answers(asked(450, 16, max_tokens=32))
    stop = next(
        word for word in (whole.text[i : i + 3] for i in range(4, 40)) if word.isprintable() and "�" not in word
    )
    stopped = asked(450, 16, max_tokens=32, stop=[stop])
    pair.check(stopped)
    assert pair.one.answers(stopped)[0].finish_reason == "stop"


def test_prefixes_that_either_engine_has(pair: Pair) -> None:
    first = asked(900, 20)
    pair.check(first)
    pair.check(first)
    pair.check(Asked(first.prompt[:500] + prompt(300, 21), first.fields))
    [answer] = pair.one.answers(first)
    pair.check(Asked(first.prompt + answer.token_ids + prompt(200, 22), first.fields))
    pair.check(asked(900, 20, temperature=1.0, seed=7))


def test_many_at_once(pair: Pair) -> None:
    requests = [asked(100 + 150 * k, 30 + k, max_tokens=24, temperature=0.8, seed=k) for k in range(8)]
    requests += [Asked(requests[3].prompt[:400] + prompt(200 + k, 40 + k), requests[3].fields) for k in range(4)]
    with ThreadPoolExecutor(len(requests)) as threads:
        for found, request in zip(threads.map(lambda r: ask(pair.server, r), requests), requests):
            pair.same(found, request)


def test_cached_tokens_are_those_of_one_engine(pair: Pair) -> None:
    request, other = asked(700, 60), prompt(300, 61)

    def cached(token_ids: list[int]) -> int:
        usage = pair.server.complete(token_ids, max_tokens=2, temperature=0)["usage"]
        assert usage["prompt_tokens"] == len(token_ids)
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(request.prompt) == 0
    assert cached(request.prompt) == 672
    assert cached(request.prompt[:480] + other) == 480


def test_a_client_that_leaves_frees_everything(pair: Pair) -> None:
    # Many: what shows that they run is seconds behind on a busy machine.
    body = {"prompt": [prompt(1900, 70 + k) for k in range(40)], "max_tokens": 100, "ignore_eos": True}
    for path_to_end in ("waiting", "streaming"):
        with streaming(pair.server, "/v1/completions", body) as events:
            if path_to_end == "streaming":
                next(events)
            else:
                until(lambda: not pair.server.is_idle(), what="a request that runs")
        pair.server.until_idle()
        body["prompt"] = [prompt(1900, 170 + k) for k in range(40)]
    pair.check(asked(1000, 71))


@pytest.mark.skipif(not usable_kernels(), reason="bit-equal with native kernels only")
def test_roles_may_have_settings_of_their_own(tmp_path: Path) -> None:
    roles = tmp_path / "roles.yaml"
    roles.write_text(
        "prefill: {engines: 2, kv_cache_memory_bytes: 16M, max_num_batched_tokens: 96}\n"
        f"decode: {{kv_cache_memory_bytes: {KV_BYTES}, max_num_seqs: 4}}\n"
    )
    with RealServer("--pd", str(roles), *COMMON, model=MODEL) as server:
        one = Reference()
        pair = Pair(server.until_ready(), one, True)
        for number in range(3):
            pair.check(asked(300 + number, 900 + number))
        server.until_idle()
        assert handoffs(server)["received"] == 3 and handoffs(server)["failed"] == 0
        text = server.http.get("/metrics").text
        one.close()
    blocks = [int(n) for n in re.findall(r'cache_config_info{.*num_gpu_blocks="(\d+)"', text)]
    assert len(blocks) == 3 and blocks[0] == blocks[1] < blocks[2]


@pytest.mark.skipif(not usable_kernels(), reason="bit-equal with native kernels only")
def test_prompts_that_come_from_a_tier_are_handed_over() -> None:
    """More prefixes than the devices hold, each used again: an engine's loads and sends are moves of one request."""
    flags = ("--kv-cache-memory-bytes", "8M", "--kv-offloading-size", "64M")
    with RealServer("--pd", "1P1D", *COMMON, *flags, model=MODEL) as server:
        one = Reference()
        pair = Pair(server.until_ready(), one, True)
        for number in range(30):
            head, tail = prompt(480, 700 + number % 10), prompt(220, 800 + number)
            pair.check(Asked(head + tail, {"max_tokens": 8, "ignore_eos": True}))
        server.until_idle()
        one.close()
        text = server.http.get("/metrics").text
        assert handoffs(server)["received"] and handoffs(server)["failed"] == 0
    loaded = re.findall(r'tier_hit_blocks_total{.*tier="host".*} ([0-9.e+]+)', text)
    assert sum(map(float, loaded)) > 0, "nothing came from a tier"
