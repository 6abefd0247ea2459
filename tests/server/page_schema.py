"""The page's JSON as a checkable description: the fields of docs/page.md, and a small checker of values against it.

An object has exactly the named fields; a name that ends in "?" may be absent. `null(x)` also takes null. Knows no
server; `problems` says what is wrong and where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Null:
    inner: Any


@dataclass(frozen=True)
class Table:
    """An object with free names and values of one kind."""

    inner: Any


@dataclass(frozen=True)
class OneOf:
    values: tuple[str, ...]


def null(inner: Any) -> Null:
    return Null(inner)


INT, NUMBER, TEXT = int, (int, float), str
SCALAR = (str, int, float, bool)
SERIES_COLUMNS = (
    "ts",
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens_per_s",
    "prompt_tokens_cached_per_s",
    "generation_tokens_per_s",
    *(f"time_to_first_token_seconds_{q}" for q in ("p50", "p95", "p99")),
    *(f"inter_token_latency_seconds_{q}" for q in ("p50", "p95", "p99")),
)
ROLE = OneOf(("mixed", "prefill", "decode"))
KIND = OneOf(("queue", "load", "prefill", "transfer", "decode", "preempted"))
FINISH = null(OneOf(("stop", "length", "abort", "error", "tool_calls")))
SOURCES = ("device", "peer", "host", "disk", "remote", "compute")
TIER = OneOf(("host", "disk", "remote"))

HELLO = {
    "schema": INT,
    "version": TEXT,
    "model": {"id": TEXT},
    "device": {"name": TEXT},
    "config": [
        {
            "name": TEXT,
            "value": SCALAR,
            "origin": OneOf(("default", "auto", "model", "file", "env", "flag")),
            "note": TEXT,
        }
    ],
    "engines": [{"id": TEXT, "role": ROLE, "device": TEXT, "kv": {"block_size": INT, "num_blocks": INT}}],
    "spec": null({"method": TEXT, "max_draft_tokens": INT}),
    "series": {"interval_s": NUMBER, "columns": {name: [null(NUMBER)] for name in SERIES_COLUMNS}},
}

REQUEST = {
    "request_id": TEXT,
    "state": OneOf(("waiting", "loading", "prefill", "transfer", "decode", "finished", "aborted")),
    "arrival_ts": NUMBER,
    "finish_ts?": null(NUMBER),
    "finish_reason?": FINISH,
    "prompt_tokens": INT,
    "cached_tokens": null(INT),
    "generation_tokens": INT,
    "engine": TEXT,
    "spans": [{"kind": KIND, "tier?": TIER, "start_ts": NUMBER, "end_ts?": null(NUMBER)}],
}

KV = {
    "block_size": INT,
    "num_blocks": INT,
    **{state: null(INT) for state in ("used", "shared", "filling", "cached", "free")},
    "map": null({"num_cells": INT, "blocks_per_cell": NUMBER, "cells": TEXT}),
}

HANDOFFS = {
    **{f"num_{what}": INT for what in ("sent", "received", "failed", "local", "sending", "receiving")},
    **{f"tokens_{what}": INT for what in ("received", "received_cached")},
}

ROUTE = {
    "ts": NUMBER,
    "request_id": TEXT,
    "prompt_tokens": INT,
    "engine": TEXT,
    "prefill_at": [TEXT],
    "reason": TEXT,
    "predicted_ttft_s": null(NUMBER),
    "terms": Table(NUMBER),
    "runner_ups": [{"engine": TEXT, "score": NUMBER}],
    "hit_tokens": null(INT),
    "new_tokens": null(INT),
    "num_tries": INT,
    "ttft_s": null(NUMBER),
    "outcome": TEXT,
}

ROUTES = {"routes": [ROUTE]}

SNAPSHOT = {
    "seq": INT,
    "ts": NUMBER,
    "uptime_s": NUMBER,
    "totals": {
        "num_requests_running": null(INT),
        "num_requests_waiting": null(INT),
        "num_requests_waiting_by_reason": Table(INT),
        "kv_cache_usage_perc": null(NUMBER),
        "num_preemptions_total": null(INT),
        "prompt_tokens_total": null(INT),
        "prompt_tokens_cached_total": null(INT),
        "generation_tokens_total": null(INT),
    },
    "series": {name: null(NUMBER) for name in SERIES_COLUMNS},
    "prompt_tokens_by_source": {
        "window_s": null(NUMBER),
        **{source: null(INT) for source in SOURCES},
    },
    "tiers": Table(
        {
            **dict.fromkeys(("capacity_blocks", "used_blocks", "hit_blocks_total"), INT),
            **dict.fromkeys(("read_bytes_total", "written_bytes_total"), INT),
            **dict.fromkeys(("read_bytes_per_s", "written_bytes_per_s"), null(NUMBER)),
            **dict.fromkeys(("load_seconds_total", "saved_seconds_total"), NUMBER),
            "state": TEXT,
        }
    ),
    "spec_decode": null(
        {
            "acceptance_rate_per_pos": [null(NUMBER)],
            "mean_accepted_length": null(NUMBER),
            "measured_speedup": null(NUMBER),
            "num_requests_drafting": null(INT),
        }
    ),
    "engines": [
        {
            "id": TEXT,
            "role": ROLE,
            "is_alive": bool,
            "num_requests_running": null(INT),
            "num_requests_waiting": null(INT),
            "kv_cache_usage_perc": null(NUMBER),
            "prompt_tokens_per_s": null(NUMBER),
            "generation_tokens_per_s": null(NUMBER),
            "handoffs": null(HANDOFFS),
            "kv": KV,
        }
    ],
    "links": [
        {
            **dict.fromkeys(("src", "dst", "scheme"), TEXT),
            **dict.fromkeys(("num_in_flight", "num_transfers", "num_failed", "bytes"), INT),
            **dict.fromkeys(("bytes_per_s", "gigabytes_per_s", "overlap"), NUMBER),
            "exposed_s": null(NUMBER),
        }
    ],
    "handoffs": null(HANDOFFS),
    "router": null({"decisions_per_s": null(NUMBER), "decisions": [ROUTE]}),
    "requests": null([REQUEST]),
}

EXPLAIN = {
    "request_id": TEXT,
    "prompt_tokens": INT,
    "generation_tokens": INT,
    "finish_reason?": FINISH,
    "time_to_first_token_s?": null(NUMBER),
    "tokens_per_s?": null(NUMBER),
    "queue_reason": TEXT,
    "spans": [
        {
            "kind": KIND,
            "start_s": NUMBER,
            "end_s": NUMBER,
            "engine?": TEXT,
            "from?": TEXT,
            "tier?": TIER,
            "num_tokens?": INT,
        },
    ],
    "prefix": null(
        {
            "block_size": INT,
            "runs": [{"source": OneOf(SOURCES), "start": INT, "end": INT}],
            "miss": null(
                {
                    "reason": OneOf(("first_seen", "diverged", "evicted", "tail", "cheaper", "disabled")),
                    "at_token": INT,
                    "detail": TEXT,
                }
            ),
        }
    ),
    "spec?": {"num_drafts": INT, "num_draft_tokens": INT, "num_accepted_tokens": INT},
    "route?": ROUTE,
}


def problems(value: Any, kind: Any, where: str = "$") -> Iterator[str]:
    """Every place where `value` is not as `kind` says; nothing if it is."""
    if isinstance(kind, Null):
        if value is not None:
            yield from problems(value, kind.inner, where)
    elif isinstance(kind, OneOf):
        if value not in kind.values:
            yield f"{where}: {value!r} is none of {kind.values}"
    elif isinstance(kind, Table):
        if not isinstance(value, dict):
            yield f"{where}: {value!r} is no object"
        else:
            for name, item in value.items():
                yield from problems(item, kind.inner, f"{where}.{name}")
    elif isinstance(kind, dict):
        yield from _object_problems(value, kind, where)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
        else:
            for index, item in enumerate(value):
                yield from problems(item, kind[0], f"{where}[{index}]")
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind in (INT, NUMBER)):
        yield f"{where}: {value!r} is no {kind}"


def _object_problems(value: Any, kind: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no object"
        return
    known = {name.removesuffix("?"): inner for name, inner in kind.items()}
    for name in kind:
        if not name.endswith("?") and name not in value:
            yield f"{where}: {name} is missing"
    for name, item in value.items():
        if name in known:
            yield from problems(item, known[name], f"{where}.{name}")
        else:
            yield f"{where}: {name} is not in the schema"
