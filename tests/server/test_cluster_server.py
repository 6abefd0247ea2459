"""A server before several engines, asked over HTTP: metrics per engine, routes, explanations, the page's data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.server import page_schema
from tests.server.cluster_server import ROLES, ClusterServer, cluster_server
from tests.server.page_schema import problems


@pytest.fixture(scope="module")
def server() -> Iterator[ClusterServer]:
    with cluster_server() as running:
        yield running


@pytest.fixture
def client(server: ClusterServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base, timeout=30) as opened:
        yield opened


def ask(client: httpx.Client, number: int, max_tokens: int = 20) -> dict[str, Any]:
    body = {"prompt": [5 + number] * 30, "max_tokens": max_tokens, "temperature": 0}
    response = client.post("/v1/completions", json=body, headers={"x-request-id": f"call-{number}"})
    assert response.status_code == 200, response.text
    return dict(response.json())


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def metric(client: httpx.Client, name: str) -> dict[str, float]:
    """Engine number -> value, for families without other labels."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name + "{"):
            found[line.split('engine="')[1].split('"')[0]] = float(line.rpartition(" ")[2])
    return found


def test_requests_are_routed_and_routes_are_told(client: httpx.Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: ask(client, number), range(8)))
    assert all(answer["usage"]["completion_tokens"] == 20 for answer in answers)
    told = client.get("/routes/recent").json()
    assert list(problems(told, page_schema.ROUTES)) == []
    assert {route["engine"] for route in told["routes"]} == {"decode-0", "decode-1"}, "least loaded spreads them"
    assert all(route["prefill_at"] == ["prefill-0"] for route in told["routes"])
    assert all(route["outcome"] == "length" and route["ttft_s"] > 0 for route in told["routes"])
    explained = client.get("/explain/call-3").json()
    assert list(problems(explained, page_schema.EXPLAIN)) == []
    assert explained["route"]["request_id"] == explained["request_id"]
    assert explained["route"]["engine"] in ("decode-0", "decode-1")


def test_metrics_are_per_engine_and_fall_to_zero_when_all_is_over(client: httpx.Client) -> None:
    before = metric(client, "vllm:request_success_total")  # the last reason's line wins: only engines matter here
    assert set(before) == {"0", "1", "2"}
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, client, 20 + number, 60) for number in range(4)]
        until(lambda: sum(metric(client, "vllm:num_requests_running").values()) > 1)
        for future in running:
            future.result()
    ended_s = time.monotonic()
    until(lambda: client.get("/live/snapshot").json()["totals"]["num_requests_running"] == 0)
    decoding = metric(client, "vllm:num_requests_running")
    assert (decoding["1"], decoding["2"]) == (0, 0)
    assert time.monotonic() - ended_s < 10, "a report follows the end; 0.3 s where nothing else runs"
    generated = metric(client, "vllm:generation_tokens_total")
    assert generated["0"] == 0 and generated["1"] > 0 and generated["2"] > 0
    assert metric(client, "penstock:engine_up") == {"0": 1, "1": 1, "2": 1}


def test_the_pages_data_names_all_engines(client: httpx.Client) -> None:
    hello = client.get("/live/snapshot?hello=1").json()
    assert list(problems(hello, page_schema.HELLO)) == []
    assert {engine["id"]: engine["role"] for engine in hello["engines"]} == ROLES
    until(lambda: bool(client.get("/live/snapshot").json()["tiers"]))
    snapshot = client.get("/live/snapshot").json()
    assert list(problems(snapshot, page_schema.SNAPSHOT)) == []
    assert [engine["id"] for engine in snapshot["engines"]] == list(ROLES)
    assert snapshot["handoffs"]["num_received"] > 0 and snapshot["links"][0]["bytes"] > 0


def test_an_answer_explains_its_route(client: httpx.Client) -> None:
    body = {"prompt": [9] * 30, "max_tokens": 4, "explain": True}
    answer = client.post("/v1/completions", json=body).json()
    found = [value for value in answer.values() if isinstance(value, dict) and "route" in value]
    assert len(found) == 1 and found[0]["route"]["prefill_at"] == ["prefill-0"]
