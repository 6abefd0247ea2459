"""The page's view of engines, of what moves between them, and of the tiers below them: from reports to plain data.

Keeps a few seconds of running totals for rates, told the time by its caller. Knows the engine's messages; no HTTP and
no clock. The fields are those of `docs/page.md`; `None` means "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engine.messages import HandOffs, KVReport, LinkReport, Ready, Report, TierReport
from penstock.server.live_series import TIERS, Totals, hands_over

ENGINE_ID = "E0"  # of an engine that is alone and so has no name
RATE_WINDOW_S = 2.0  # of tokens
LINK_WINDOW_S = 9.0  # of bytes: prompts come in lumps

Json = dict[str, Any]


class ClusterSeries:
    """Running totals of each engine, link and tier, of the last seconds."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, ...], Totals] = {}

    def tick(self, now: float, report: Report | None) -> None:
        """Remember what `report` says as of `now`."""
        if report is None:
            return
        for engine in report.engines or [report]:
            name = engine.name
            self._remember(("engine", name), now, (engine.prefill_tokens_total, engine.generation_tokens_total))
            for link in engine.links:
                exposed_us = round(1e6 * link.exposed_s)
                self._remember(("link", name, link.peer), now, (link.num_bytes, link.num_transfers, exposed_us))
        for name, tier in merged_tiers(report).items():
            self._remember(("tier", name), now, (tier.read_bytes, tier.written_bytes))

    def _remember(self, key: tuple[str, ...], now: float, totals: tuple[int, ...]) -> None:
        self._totals.setdefault(key, Totals(LINK_WINDOW_S)).tick(now, totals)

    def rate(self, window_s: float, index: int, *key: str) -> float | None:
        """Increase per second of one total; None while it is not known."""
        totals = self._totals.get(key)
        return None if totals is None else totals.rate(window_s, index)

    def exposed_s(self, engine: str, link: LinkReport) -> float | None:
        """Mean time of a transfer that no step hid: of the last seconds, or of all where there were none."""
        totals = self._totals.get(("link", engine, link.peer))
        found = None if totals is None else totals.difference(LINK_WINDOW_S)
        if found is not None and found[1][1]:
            return round(found[1][2] / found[1][1] / 1e6, 6)
        return round(link.exposed_s / link.num_transfers, 6) if link.num_transfers else None


def engine_places(ready: Ready) -> list[Json]:
    """What is said once of each engine."""
    return [
        {
            "id": engine_id(each),
            "role": _role("" if each.peer is None else each.peer.role),
            "device": each.device,
            "kv": {"block_size": each.block_size, "num_blocks": each.num_blocks},
        }
        for each in ready.engines or [ready]
    ]


def _role(role: str) -> str:
    return role if role in ("prefill", "decode") else "mixed"


def engine_id(ready: Ready) -> str:
    return ENGINE_ID if ready.peer is None else ready.peer.name


def engine_rows(ready: Ready, report: Report | None, series: ClusterSeries) -> list[Json]:
    """Every engine's numbers, also of those that have said nothing yet."""
    reports = {} if report is None else {each.name or ENGINE_ID: each for each in report.engines or [report]}
    rows = []
    for each in ready.engines or [ready]:
        told = reports.get(engine_id(each))
        place = engine_places(each)[0]
        name = "" if told is None else told.name
        rows.append(
            {
                "id": place["id"],
                "role": place["role"] if told is None else _role(told.role),
                "is_alive": told is None or told.is_alive,
                "num_requests_running": None if told is None else told.num_running,
                "num_requests_waiting": None if told is None else told.num_waiting,
                "kv_cache_usage_perc": None if told is None else kv_usage(told.kv),
                "prompt_tokens_per_s": series.rate(LINK_WINDOW_S, 0, "engine", name),
                "generation_tokens_per_s": series.rate(RATE_WINDOW_S, 1, "engine", name),
                "handoffs": None if told is None else handoff_row(told.handoffs),
                "kv": _kv(each, None if told is None else told.kv),
            }
        )
    return rows


def handoff_row(told: HandOffs | None) -> Json | None:
    """Prompts between engines; None where there are none to hand over."""
    return None if told is None else {name: getattr(told, name) for name in told.__struct_fields__}


def cluster_handoffs(report: Report | None) -> Json | None:
    """Of all engines; None where each computes its own prompts."""
    return handoff_row(report.handoffs) if report is not None and hands_over(report) else None


def link_rows(report: Report | None, series: ClusterSeries) -> list[Json]:
    """Every link that has carried something, and who sends over it."""
    return [
        {
            "src": engine.name,
            "dst": link.peer,
            "scheme": link.scheme,
            "bytes_per_s": series.rate(LINK_WINDOW_S, 0, "link", engine.name, link.peer) or 0.0,
            "num_in_flight": link.num_in_flight,
            "num_transfers": link.num_transfers,
            "num_failed": link.num_failed,
            "bytes": link.num_bytes,
            "gigabytes_per_s": round(link.gigabytes_per_s, 3),
            "overlap": round(link.overlap, 3),
            "exposed_s": series.exposed_s(engine.name, link),
        }
        for engine in (() if report is None else report.engines)
        for link in engine.links
    ]


def merged_tiers(report: Report) -> Mapping[str, TierReport]:
    """By name, the fastest first: what engines took is summed; what the pool holds is told by each of them."""
    parts: dict[str, list[TierReport]] = {}
    for engine in report.engines or [report]:
        for tier in engine.tiers:
            parts.setdefault(tier.name, []).append(tier)
    return {name: _one_tier(name, parts[name]) for name in sorted(parts, key=_order)}


def _order(tier: str) -> int:
    return TIERS.index(tier) if tier in TIERS else len(TIERS)


def _one_tier(name: str, parts: list[TierReport]) -> TierReport:
    states = [part.state for part in parts]
    return TierReport(
        name,
        max(part.capacity_blocks for part in parts),
        max(part.used_blocks for part in parts),
        sum(part.hit_blocks for part in parts),
        sum(part.read_bytes for part in parts),
        sum(part.written_bytes for part in parts),
        sum(part.load_s for part in parts),
        sum(part.saved_s for part in parts),
        "on" if "on" in states else states[0],
        max(part.latency_s for part in parts),
        max(part.byte_s for part in parts),
    )


def tier_rows(report: Report | None, series: ClusterSeries) -> Json:
    """Tier name -> its numbers."""
    return {
        name: {
            "capacity_blocks": tier.capacity_blocks,
            "used_blocks": tier.used_blocks,
            "hit_blocks_total": tier.hit_blocks,
            "read_bytes_total": tier.read_bytes,
            "written_bytes_total": tier.written_bytes,
            "read_bytes_per_s": series.rate(LINK_WINDOW_S, 0, "tier", name),
            "written_bytes_per_s": series.rate(LINK_WINDOW_S, 1, "tier", name),
            "load_seconds_total": round(tier.load_s, 3),
            "saved_seconds_total": round(tier.saved_s, 3),
            "state": tier.state,
        }
        for name, tier in ({} if report is None else merged_tiers(report)).items()
    }


def kv_usage(kv: KVReport) -> float | None:
    """Share of the blocks that requests hold, 0 to 1, as vLLM counts it."""
    return round((kv.used + kv.shared + kv.filling) / kv.num_blocks, 6) if kv.num_blocks else None


def _kv(ready: Ready, kv: KVReport | None) -> Json:
    if kv is None:
        states = dict.fromkeys(("used", "shared", "filling", "cached", "free"))
        return {"block_size": ready.block_size, "num_blocks": ready.num_blocks, **states, "map": None}
    return {
        "block_size": kv.block_size,
        "num_blocks": kv.num_blocks,
        "used": kv.used,
        "shared": kv.shared,
        "filling": kv.filling,
        "cached": kv.cached,
        "free": kv.free,
        "map": {"num_cells": kv.num_cells, "blocks_per_cell": kv.blocks_per_cell, "cells": kv.cells}
        if kv.cells
        else None,
    }
