"""Messages as an engine would send them, with the numbers that tests look for."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.engine.messages import KVReport, Miss, Ready, Report, RequestRecord, Span

READY = Ready("tiny", 1024, 32, 100, 8, "2-core CPU", [], [])
KV = KVReport(32, 100, used=20, shared=5, filling=5, cached=30, free=40)
MAPPED = msgspec.structs.replace(KV, num_cells=100, blocks_per_cell=1, cells="u20s5f5c30.40")


def report(now: float, prompt: int = 100, cached: int = 64, requests: tuple[RequestRecord, ...] = ()) -> Report:
    kv = MAPPED if requests else KV
    totals = (9, 0.5, prompt, cached, 7, 0, prompt, cached)
    sources = {"device": cached, "compute": prompt - cached}
    return Report(now, 1, 1, {"budget": 1}, kv, *totals, [3], list(requests), prompt_tokens_by_source=sources)


def record(request_id: str, **changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "request_id": request_id,
        "state": "decode",
        "prompt_tokens": 40,
        "cached_tokens": 32,
        "generation_tokens": 3,
        "arrival_s": 100.0,
        "admitted_s": 100.5,
        "first_token_s": 101.0,
        "finish_s": None,
        "finish_reason": None,
        "num_preemptions": 0,
        "queue_reason": "slots",
        "spans": [
            Span("queue", 100.0, 100.5),
            Span("prefill", 100.5, 100.7, 4),
            Span("prefill", 100.7, 101.0, 4),
            Span("decode", 101.0, None),
        ],
        "miss": Miss("diverged", 32, "the nearest cached prompt is equal for 32 tokens"),
        "block_size": 32,
    }
    return RequestRecord(**{**values, **changes})
