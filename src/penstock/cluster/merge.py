"""What many engines say of themselves, as if one said it: for front ends, metrics and the page. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from penstock.engine.messages import HandOffs, KVReport, Ready, Report

MAX_RECORDS = 200


def merged_ready(ready: Sequence[Ready], decoding: Sequence[Ready]) -> Ready:
    """All engines of a cluster, of which `decoding` give answers: their rows and blocks count."""
    slowest = max(ready, key=lambda each: sum(seconds for _, seconds in each.timeline))
    return Ready(
        model_id=decoding[0].model_id,
        max_model_len=min(each.max_model_len for each in ready),
        block_size=decoding[0].block_size,
        num_blocks=sum(each.num_blocks for each in decoding),
        max_num_seqs=sum(each.max_num_seqs for each in decoding),
        device=f"{len(ready)} engines of {ready[0].device}",
        memory=ready[0].memory,
        timeline=slowest.timeline,
        engines=list(ready),
    )


def merged_report(
    reports: Sequence[Report], now: float, newest: Report | None = None, past: Sequence[Report] = ()
) -> Report:
    """The reports of all engines as one, each request counted once: where it is decoded.

    `newest`: the one that has just come. `past`: the last words of engines that are gone, so that totals never fall.
    """
    waiting: Counter[str] = Counter()
    for report in reports:
        waiting.update(report.waiting_by_reason)
        waiting.subtract(report.guests_waiting_by_reason)
    counted = [*reports, *past]
    sources: Counter[str] = Counter()
    for report in counted:
        sources.update(report.prompt_tokens_by_source)
    alive = {report.name for report in reports}
    gone = {report.name: report for report in past if report.name not in alive}
    return Report(
        now_s=now,
        num_running=sum(r.num_running - r.guests_running for r in reports),
        num_waiting=waiting.total(),
        waiting_by_reason=dict(+waiting),
        kv=_merged_kv([r.kv for r in reports]),
        num_steps_total=sum(r.num_steps_total for r in counted),
        step_seconds_total=sum(r.step_seconds_total for r in counted),
        prompt_tokens_total=sum(r.prompt_tokens_total for r in counted),
        prompt_tokens_cached_total=sum(r.prompt_tokens_cached_total for r in counted),
        generation_tokens_total=sum(r.generation_tokens_total for r in counted),
        num_preemptions_total=sum(r.num_preemptions_total for r in counted),
        prefix_queries_total=sum(r.prefix_queries_total for r in counted),
        prefix_hits_total=sum(r.prefix_hits_total for r in counted),
        iteration_tokens=[] if newest is None else newest.iteration_tokens,
        requests=[record for report in reports for record in report.requests][:MAX_RECORDS],
        name="" if newest is None else newest.name,
        prompt_tokens_by_source=dict(sources),
        prefill_tokens_total=sum(r.prefill_tokens_total for r in counted),
        handoffs=_merged_handoffs([r.handoffs for r in counted if r.handoffs is not None]),
        engines=[msgspec.structs.replace(report, requests=[]) for report in [*reports, *gone.values()]],
    )


def without_gauges(report: Report) -> Report:
    """Only what it has counted since its start."""
    kv = KVReport(report.kv.block_size, report.kv.num_blocks, 0, 0, 0, 0, 0)
    handoffs = report.handoffs and msgspec.structs.replace(report.handoffs, num_sending=0, num_receiving=0)
    return msgspec.structs.replace(
        report,
        num_running=0,
        num_waiting=0,
        waiting_by_reason={},
        kv=kv,
        iteration_tokens=[],
        requests=[],
        is_alive=False,
        guests_running=0,
        guests_waiting_by_reason={},
        handoffs=handoffs,
        links=[msgspec.structs.replace(link, num_in_flight=0) for link in report.links],
    )


def _merged_kv(parts: Sequence[KVReport]) -> KVReport:
    """Sums. The maps stay with their engines."""
    return KVReport(
        block_size=parts[0].block_size if parts else 0,
        num_blocks=sum(part.num_blocks for part in parts),
        used=sum(part.used for part in parts),
        shared=sum(part.shared for part in parts),
        filling=sum(part.filling for part in parts),
        cached=sum(part.cached for part in parts),
        free=sum(part.free for part in parts),
    )


def _merged_handoffs(parts: Sequence[HandOffs]) -> HandOffs | None:
    if not parts:
        return None
    return HandOffs(*(sum(getattr(part, name) for part in parts) for name in HandOffs.__struct_fields__))
