"""From the engine's messages to the page's JSON: pure functions, plain data in and plain data out.

The fields are those of `docs/page.md`. `None` becomes null and means "not measured", never zero. Knows no clock, no
HTTP and no state; times come in as seconds of the engine's clock and leave as seconds since 1970 with `wall` added.
No prompt text, no token id and no header passes through here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from penstock.config.schema import Config
from penstock.engine.messages import Ready, Report, RequestRecord, Span
from penstock.server.live_cluster import (
    ENGINE_ID,
    ClusterSeries,
    Json,
    cluster_handoffs,
    engine_places,
    engine_rows,
    kv_usage,
    link_rows,
    tier_rows,
)
from penstock.server.live_series import Row, Series

MAX_SPANS = 12
MERGE_GAP_S = 0.05  # spans of one kind this close are one span in the table; /explain has them all
SHORT_QUEUE_S = 0.03  # who waited less has no reason to be told
MAX_SETTING_CHARS = 200

QUEUE_WORDS = {
    "slots": "all places for running requests were taken",
    "budget": "the step's token budget was full",
    "capacity": "no free blocks",
    "shared_block": "another request was computing the same block",
    "preempted": "it was preempted and had to come back",
    "grammar": "its grammar was being compiled",
    "media": "its images were being read",
    "kv_load": "its blocks were being loaded",
    "kv_transfer": "its blocks were being transferred",
}


@dataclass(slots=True)
class Track:
    """What the front end saw of one request. Written by the observer alone; seconds of the engine's clock."""

    request_id: str
    num_prompt_tokens: int
    received_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    finish_s: float | None = None
    finish_reason: str | None = None
    record: RequestRecord | None = None  # the newest that the engine sent
    row: msgspec.Raw | None = None  # its line of the table, encoded, once it ended
    engine: str = ""  # that decodes it; "" where there is one without a name

    @property
    def time_to_first_token_s(self) -> float | None:
        """From arrival at the front end to the first token leaving it."""
        return None if self.first_s is None else self.first_s - self.received_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first over the time since the first."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2 or self.last_s <= self.first_s:
            return None
        return (self.num_tokens - 1) / (self.last_s - self.first_s)


def config_rows(config: Config) -> list[Json]:
    """Every setting with its value and who set it. A secret's value never leaves."""
    rows: list[Json] = []
    for part in fields(config):
        section = getattr(config, part.name)
        if not hasattr(section, "__dataclass_fields__"):
            continue
        for setting in fields(section):
            value = getattr(section, setting.name)
            if setting.metadata.get("secret"):
                value = "set, not shown" if value else "not set"
            origin, note = config.origins.get(setting.name, ("default", ""))
            rows.append({"name": setting.name, "value": _plain(value), "origin": origin, "note": note})
    return rows


def _plain(value: Any) -> str | int | float | bool:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool | int | float):
        return value
    text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return text if len(text) <= MAX_SETTING_CHARS else text[:MAX_SETTING_CHARS] + " …"


def hello(version: str, model_id: str, config: list[Json], ready: Ready, series: Series, interval_s: float) -> Json:
    """What a listener is told once."""
    return {
        "schema": 1,
        "version": version,
        "model": {"id": model_id},
        "device": {"name": ready.device},
        "config": config,
        "engines": engine_places(ready),
        "spec": None,
        "series": {"interval_s": interval_s, "columns": series.columns()},
    }


def snapshot(
    seq: int, uptime_s: float, ready: Ready, report: Report | None, series: Series, cluster: ClusterSeries, row: Row
) -> Json:
    """All numbers of one tick but the requests and routes, which the caller adds (requests are null on the ticks that
    leave them out)."""
    usage = None if report is None else kv_usage(report.kv)
    return {
        "seq": seq,
        "ts": row["ts"],
        "uptime_s": round(uptime_s, 1),
        "totals": {
            "num_requests_running": None if report is None else report.num_running,
            "num_requests_waiting": None if report is None else report.num_waiting,
            "num_requests_waiting_by_reason": {} if report is None else report.waiting_by_reason,
            "kv_cache_usage_perc": usage,
            "num_preemptions_total": None if report is None else report.num_preemptions_total,
            "prompt_tokens_total": None if report is None else report.prompt_tokens_total,
            "prompt_tokens_cached_total": None if report is None else report.prompt_tokens_cached_total,
            "generation_tokens_total": series.num_generated,
        },
        "series": row,
        "prompt_tokens_by_source": series.by_source(),
        "tiers": tier_rows(report, cluster),
        "spec_decode": None,
        "engines": engine_rows(ready, report, cluster),
        "links": link_rows(report, cluster),
        "handoffs": cluster_handoffs(report),
        "router": None,
        "requests": None,
    }


class SpanRow(msgspec.Struct):
    """One piece of a request's small timeline. A struct: half the time of a dict, and there are thousands."""

    kind: str
    start_ts: float
    end_ts: float | None
    tier: str | msgspec.UnsetType = msgspec.UNSET  # of a load


class RequestRow(msgspec.Struct):
    """One line of the page's table."""

    request_id: str
    state: str
    arrival_ts: float
    finish_ts: float | None
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int | None
    generation_tokens: int
    engine: str
    spans: list[SpanRow]


def request_row(track: Track, wall: float) -> RequestRow:
    """`track` as the table shows it."""
    record, finish_s = track.record, track.finish_s
    if record is not None and (record.first_token_s is not None or track.first_s is None):
        state, spans = record.state, record.spans
    elif track.first_s is None:
        state, spans = "waiting", [Span("queue", track.received_s, None)]
    else:  # tokens have come since the engine's last word, if there was one
        past = [] if record is None else record.spans
        closed = [s if s.end_s is not None else Span(s.kind, s.start_s, track.first_s, s.num_tokens) for s in past]
        state, spans = "decode", [*closed, Span("decode", track.first_s, None)]
    if finish_s is not None:
        state = "aborted" if track.finish_reason in ("abort", "error") else "finished"
    return RequestRow(
        track.request_id,
        state,
        round(track.received_s + wall, 3),
        None if finish_s is None else round(finish_s + wall, 3),
        track.finish_reason,
        track.num_prompt_tokens,
        None if record is None or record.admitted_s is None else record.cached_tokens,
        track.num_tokens,
        (track.engine if record is None else record.engine) or ENGINE_ID,
        merged(spans, wall, finish_s),
    )


def merged(spans: Iterable[Span], wall: float, finish_s: float | None) -> list[SpanRow]:
    """Neighbours of one kind become one span, and the last 12 are kept. Spans left open end at `finish_s`."""
    out: list[SpanRow] = []
    last: Span | None = None
    for span in spans:
        end_s = span.end_s if span.end_s is not None else finish_s
        end_ts = None if end_s is None else round(end_s + wall, 3)
        near = last is not None and last.end_s is not None and span.start_s - last.end_s <= MERGE_GAP_S
        if near and last is not None and last.kind == span.kind:
            out[-1].end_ts = end_ts
        else:
            tier = span.place if span.kind == "load" else msgspec.UNSET
            out.append(SpanRow(span.kind, round(span.start_s + wall, 3), end_ts, tier))
        last = span
    return out[-MAX_SPANS:]


def explain(track: Track, now: float) -> Json:
    """Where one request's time went, in seconds from its arrival at the front end."""
    record = track.record
    end_s = track.finish_s if track.finish_s is not None else now
    ttft, speed = track.time_to_first_token_s, track.tokens_per_s
    told: Json = {
        "request_id": track.request_id,
        "prompt_tokens": track.num_prompt_tokens,
        "generation_tokens": track.num_tokens,
        "finish_reason": track.finish_reason,
        "time_to_first_token_s": None if ttft is None else round(ttft, 6),
        "tokens_per_s": None if speed is None else round(speed, 3),
        "queue_reason": "",
        "spans": [],
        "prefix": None,
    }
    if record is None:
        return told
    base = track.received_s
    waited_s = (record.admitted_s if record.admitted_s is not None else end_s) - record.arrival_s
    if waited_s >= SHORT_QUEUE_S:
        told["queue_reason"] = QUEUE_WORDS.get(record.queue_reason, record.queue_reason)
    # Steps after the prompt are not counted one by one. Where they are one span, it made all tokens but the first.
    num_decode_spans = sum(span.kind == "decode" for span in record.spans)
    num_decoded = max(0, track.num_tokens - 1) if num_decode_spans == 1 else 0
    told["spans"] = [
        {
            "kind": span.kind,
            "start_s": round(max(0.0, span.start_s - base), 6),
            "end_s": round(max(0.0, (end_s if span.end_s is None else span.end_s) - base), 6),
            "engine": record.engine or ENGINE_ID,
            **({"tier" if span.kind == "load" else "from": span.place} if span.place else {}),
            **({"num_tokens": num_tokens} if num_tokens else {}),
        }
        for span in record.spans
        for num_tokens in (span.num_tokens or (num_decoded if span.kind == "decode" else 0),)
    ]
    if record.admitted_s is not None:  # before that nobody has looked into the cache
        told["prefix"] = _prefix(record)
    return told


def told_route(route: Mapping[str, Any], wall: float) -> Json:
    """A router's decision, with its time on the wall."""
    told = dict(route)
    return {"ts": round(told.pop("at_s") + wall, 3), **told}


def _prefix(record: RequestRecord) -> Json:
    runs, end = [], 0
    for source, num_tokens in record.sources or [("device", record.cached_tokens)]:
        runs.append((source, end, end + num_tokens))
        end += num_tokens
    if runs and runs[-1][0] == "compute":
        end = runs.pop()[1]
    runs.append(("compute", end, record.prompt_tokens))  # the rest is, or will be
    miss = record.miss
    return {
        "block_size": record.block_size,
        "runs": [{"source": source, "start": start, "end": end} for source, start, end in runs if end > start],
        "miss": None if miss is None else {"reason": miss.reason, "at_token": miss.at_token, "detail": miss.detail},
    }
