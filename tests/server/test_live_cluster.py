"""The page's view of many engines: engines, links, tiers and routes from reports, and their JSON against its schema."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from tests.server import page_schema
from tests.server.page_schema import problems
from tests.server.synthetic_cluster import CLUSTER, cluster_report, prefill_report
from tests.server.synthetic_messages import READY, record, report
from tests.server.test_live import Clock

from penstock.cluster.decisions import Decisions, Forecast
from penstock.cluster.merge import merged_report, without_gauges
from penstock.config.schema import Config
from penstock.core.request import SamplingParams
from penstock.engine.messages import Report, RequestRecord, Span
from penstock.server.live import Live
from penstock.server.live_cluster import (
    ClusterSeries,
    cluster_handoffs,
    engine_rows,
    link_rows,
    merged_tiers,
    tier_rows,
)
from penstock.server.live_series import Series, source_totals
from penstock.server.live_shapes import explain, request_row


class Routed:
    """Routes of a router that has made some decisions."""

    def __init__(self) -> None:
        self.decisions = Decisions()

    @property
    def num_routes(self) -> int:
        return self.decisions.num_made

    def engine_of(self, request_id: str) -> str:
        return self.decisions.engine_of(request_id)

    def explain_route(self, request_id: str) -> dict[str, Any] | None:
        return self.decisions.explain(request_id)

    def recent_routes(self, number: int) -> list[dict[str, Any]]:
        return self.decisions.recent(number)


def decide(routed: Routed, request_id: str, now: float) -> None:
    why = Forecast("least time", 0.25, {"wait": 100.0, "prefill": 150.0}, (("decode-1", 300.0),), 64, 936)
    routed.decisions.placed(request_id, now, 1000, "decode-0", ("prefill-0",), why, now, 1)


def make(clock: Clock, routed: Routed) -> Live:
    live = Live(Config(), "tiny", lambda message: None, clock.mono, clock.wall, routed)
    live.message(CLUSTER, clock.now)
    return live


def plain(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def test_a_snapshot_of_a_cluster_is_as_the_schema_says() -> None:
    clock, routed = Clock(), Routed()
    live = make(clock, routed)
    decide(routed, "a", clock.now)
    live.received("a", 1000, SamplingParams(), clock.now)
    for num_prompts in (2, 20):
        clock.now += 2.0
        spans = [Span("queue", 100.0, 100.5), Span("transfer", 100.5, 101.0, 960, "prefill-0")]
        known = record("a", engine="decode-0", spans=spans, sources=[("device", 32), ("peer", 968)], prompt_tokens=1000)
        live.message(cluster_report(clock.now, num_prompts, (known,)), clock.now)
        live.tick()
    hello, snapshot = plain(live._hello()), plain(live._snapshot(clock.now, True))
    assert list(problems(hello, page_schema.HELLO)) == []
    assert list(problems(snapshot, page_schema.SNAPSHOT)) == []
    assert [(e["id"], e["role"]) for e in hello["engines"]] == [("prefill-0", "prefill"), ("decode-0", "decode")]
    prefill, decode = snapshot["engines"]
    assert (prefill["num_requests_running"], prefill["num_requests_waiting"]) == (2, 1)
    assert (decode["num_requests_running"], decode["handoffs"]["num_receiving"]) == (3, 2)
    assert prefill["prompt_tokens_per_s"] == pytest.approx(18_000 / 9, rel=0.01)
    assert decode["generation_tokens_per_s"] == pytest.approx(18 * 50 / 2, rel=0.01)
    assert decode["kv"]["map"]["num_cells"] == 100
    assert snapshot["totals"]["num_requests_running"] == 3, "a request counts once: where it is decoded"
    assert snapshot["totals"]["num_requests_waiting"] == 0
    (link,) = snapshot["links"]
    assert (link["src"], link["dst"], link["num_in_flight"], link["num_failed"]) == ("prefill-0", "decode-0", 2, 1)
    assert link["bytes_per_s"] == pytest.approx(18e6 / 9, rel=0.01) and link["exposed_s"] == pytest.approx(0.002)
    (row,) = snapshot["requests"]
    assert (row["engine"], row["spans"][1]["kind"]) == ("decode-0", "transfer")
    (route,) = snapshot["router"]["decisions"]
    assert route["ts"] == pytest.approx(1.7e9 + 100) and route["prefill_at"] == ["prefill-0"]
    assert snapshot["router"]["decisions_per_s"] == 0, "it was made before the first tick"


def test_an_engine_alone_has_no_cluster() -> None:
    series = ClusterSeries()
    series.tick(100.0, report(100.0))
    (row,) = engine_rows(READY, report(100.0), series)
    assert (row["id"], row["role"], row["handoffs"], row["is_alive"]) == ("E0", "mixed", None, True)
    assert link_rows(report(100.0), series) == [] and tier_rows(report(100.0), series) == {}


def test_engines_that_compute_their_own_prompts_hand_nothing_over() -> None:
    told = cluster_report(100.0, 0)
    alike = [msgspec.structs.replace(engine, role="both") for engine in told.engines]
    assert cluster_handoffs(merged_report(alike, 100.0)) is None
    series = Series(99.0)
    series.tick(99.5, 1.7e9, merged_report(alike, 100.0))
    assert series.by_source()["peer"] is None
    assert cluster_handoffs(told) is not None


def test_prompt_tokens_count_once_by_where_they_came_from() -> None:
    told = cluster_report(100.0, 4)
    device, peer, host, disk, remote, compute = source_totals(told)
    assert (device, peer, host, disk, remote) == (320, 1000, 4 * 10 * 32, 4 * 2 * 32, 0)
    assert compute == 64 + 4 * 750, "what the prefill engine computed was computed"
    series = Series(99.0)
    series.tick(99.5, 1.7e9, cluster_report(99.5, 1))
    series.tick(100.0, 1.7e9, told)
    shares = series.by_source()
    assert (shares["peer"], shares["host"], shares["remote"], shares["compute"]) == (1000, 1280, None, 3064)
    alone = Series(99.0)
    alone.tick(99.5, 1.7e9, report(99.5))
    assert alone.by_source()["peer"] is None and alone.by_source()["compute"] == 36


def test_an_engine_that_changed_its_role_is_shown_in_the_new_one() -> None:
    told = cluster_report(100.0, 1)
    moved = [msgspec.structs.replace(engine, role="decode") for engine in told.engines]
    rows = engine_rows(CLUSTER, merged_report(moved, 100.0), ClusterSeries())
    assert [row["role"] for row in rows] == ["decode", "decode"]


def test_tiers_of_several_engines_are_one_pool() -> None:
    first = cluster_report(100.0, 1)
    second = msgspec.structs.replace(first, engines=[first.engines[1], first.engines[1]])
    tiers = merged_tiers(second)
    assert list(tiers) == ["host", "disk"], "the fastest first"
    assert (tiers["host"].capacity_blocks, tiers["host"].hit_blocks) == (400, 20)
    assert tiers["disk"].state.startswith("off: ")


def test_an_engine_that_died_is_shown_as_gone() -> None:
    dead = without_gauges(prefill_report(100.0, 5))
    decode = cluster_report(100.0, 5).engines[1]
    told = merged_report([decode], 100.0, None, [dead])
    rows = engine_rows(CLUSTER, told, ClusterSeries())
    assert [(row["id"], row["is_alive"], row["num_requests_running"]) for row in rows] == [
        ("prefill-0", False, 0),
        ("decode-0", True, 3),
    ]
    assert told.handoffs is not None and told.handoffs.num_sent == 5 and told.handoffs.num_sending == 0
    back = merged_report([prefill_report(101.0, 1), decode], 101.0, None, [dead])
    assert [engine.is_alive for engine in back.engines] == [True, True]
    assert back.prefill_tokens_total == 6064, "totals never fall"


def explained(known: RequestRecord) -> Any:
    live = make(Clock(), Routed())
    live.received("a", known.prompt_tokens, SamplingParams(), 100.0)
    live._running["a"].record = known
    return plain(explain(live._running["a"], 102.0))


def test_explain_shows_transfers_loads_and_sources() -> None:
    spans = [
        Span("queue", 100.0, 100.1),
        Span("load", 100.1, 100.2, 320, "host"),
        Span("transfer", 100.2, 100.6, 600, "prefill-0"),
        Span("prefill", 100.6, 100.7, 80),
    ]
    sources = [("device", 0), ("host", 320), ("peer", 600), ("compute", 40)]
    told = explained(record("a", engine="decode-0", prompt_tokens=1000, spans=spans, sources=sources))
    assert list(problems(told, page_schema.EXPLAIN)) == []
    assert [(s["kind"], s.get("tier"), s.get("from"), s.get("num_tokens")) for s in told["spans"]] == [
        ("queue", None, None, None),
        ("load", "host", None, 320),
        ("transfer", None, "prefill-0", 600),
        ("prefill", None, None, 80),
    ]
    runs = [(run["source"], run["start"], run["end"]) for run in told["prefix"]["runs"]]
    assert runs == [("host", 0, 320), ("peer", 320, 920), ("compute", 920, 1000)]
    assert all(span["engine"] == "decode-0" for span in told["spans"])


def test_a_request_without_a_record_is_where_the_router_sent_it() -> None:
    routed = Routed()
    decide(routed, "a", 100.0)
    live = make(Clock(), routed)
    live.received("a", 1000, SamplingParams(), 100.0)
    assert request_row(live._running["a"], 0.0).engine == "decode-0"


def test_routes_over_http() -> None:
    async def scenario() -> None:
        clock, routed = Clock(), Routed()
        live = make(clock, routed)
        for number in range(150):
            decide(routed, f"r{number}", 100.0 + number)
        live.received("r149", 1000, SamplingParams(), 249.0)
        routed.decisions.first_token("r149", 249.5)
        routed.decisions.ended("r149", "stop")
        live.finished("r149", None, "stop", 250.0)
        app = Starlette(routes=live.routes())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page") as client:
            told = (await client.get("/routes/recent")).json()
            assert list(problems(told, page_schema.ROUTES)) == []
            assert [route["request_id"] for route in told["routes"]] == [f"r{n}" for n in range(149, 49, -1)]
            newest = told["routes"][0]
            assert (newest["ttft_s"], newest["outcome"], newest["predicted_ttft_s"]) == (0.5, "stop", 0.25)
            one = (await client.get("/explain/r149")).json()
            assert list(problems(one, page_schema.EXPLAIN)) == [] and one["route"] == newest
            alone = Live(Config(), "tiny", lambda message: None)
            app.router.routes[:] = alone.routes()
            assert (await client.get("/routes/recent")).json() == {"routes": []}

    asyncio.run(scenario())


def test_reports_of_engines_travel() -> None:
    """The new fields survive the wire."""
    told = cluster_report(100.0, 3).engines[1]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=Report) == told
