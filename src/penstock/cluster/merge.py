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
    )


def merged_report(reports: Sequence[Report], newest: Report) -> Report:
    """The newest reports of all engines as one; what counts since the last report is `newest`'s alone."""
    waiting: Counter[str] = Counter()
    for report in reports:
        waiting.update(report.waiting_by_reason)
    return Report(
        now_s=newest.now_s,
        num_running=sum(r.num_running for r in reports),
        num_waiting=sum(r.num_waiting for r in reports),
        waiting_by_reason=dict(waiting),
        kv=_merged_kv([r.kv for r in reports]),
        num_steps_total=sum(r.num_steps_total for r in reports),
        step_seconds_total=sum(r.step_seconds_total for r in reports),
        prompt_tokens_total=sum(r.prompt_tokens_total for r in reports),
        prompt_tokens_cached_total=sum(r.prompt_tokens_cached_total for r in reports),
        generation_tokens_total=sum(r.generation_tokens_total for r in reports),
        num_preemptions_total=sum(r.num_preemptions_total for r in reports),
        prefix_queries_total=sum(r.prefix_queries_total for r in reports),
        prefix_hits_total=sum(r.prefix_hits_total for r in reports),
        iteration_tokens=newest.iteration_tokens,
        requests=[record for report in reports for record in report.requests][:MAX_RECORDS],
        handoffs=HandOffs(*map(sum, zip(*(msgspec.structs.astuple(report.handoffs) for report in reports)))),
    )


def without_gauges(report: Report) -> Report:
    """Only what it has counted since its start."""
    kv = KVReport(report.kv.block_size, 0, 0, 0, 0, 0, 0)
    return msgspec.structs.replace(
        report, num_running=0, num_waiting=0, waiting_by_reason={}, kv=kv, iteration_tokens=[], requests=[]
    )


def _merged_kv(parts: Sequence[KVReport]) -> KVReport:
    """Sums; the maps one behind the other where their cells are of one size."""
    same = len({part.blocks_per_cell for part in parts if part.num_cells}) == 1
    return KVReport(
        block_size=parts[0].block_size,
        num_blocks=sum(part.num_blocks for part in parts),
        used=sum(part.used for part in parts),
        shared=sum(part.shared for part in parts),
        filling=sum(part.filling for part in parts),
        cached=sum(part.cached for part in parts),
        free=sum(part.free for part in parts),
        num_cells=sum(part.num_cells for part in parts) if same else 0,
        blocks_per_cell=max(part.blocks_per_cell for part in parts),
        cells="".join(part.cells for part in parts) if same else "",
    )
