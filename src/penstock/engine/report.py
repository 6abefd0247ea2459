"""The engine's numbers for metrics and the page: counted as steps end, sent a few times a second.

Copies counters; never holds the step up: the block map is built only while somebody watches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from penstock.core.blocks import BlockPool
from penstock.core.cost import StepShape
from penstock.core.plan import Row
from penstock.core.request import Request
from penstock.core.scheduler import Scheduler
from penstock.engine.messages import HandOffs, KVReport, LinkReport, Report, RequestRecord, TierReport, Watch
from penstock.engine.timeline import Timeline

MIN_INTERVAL_S = 0.25
MAX_CELLS = 1640
MAX_RECORDS = 200
MAX_STEPS = 16  # measured ones in a report


class Reporter:
    """Builds `Report`s from a scheduler. `stepped` after each step, `due` when one may be sent.

    What an engine has beside its scheduler says so itself: `handoffs`, `links` and `tiers` are asked for each report.
    """

    def __init__(self, scheduler: Scheduler, timeline: Timeline) -> None:
        self._scheduler = scheduler
        self._timeline = timeline
        self._num_steps = 0
        self._step_seconds = 0.0
        self._iteration_tokens: list[int] = []
        self._last_s = float("-inf")
        self._changed = True
        self._watch: Watch | None = None
        self._prefill_tokens = 0
        self.name = self.role = ""
        self.tells_steps = False  # to whoever predicts what steps cost
        self._steps: list[tuple[int, int, int, int, float]] = []
        self.handoffs: Callable[[], HandOffs | None] = lambda: None
        self.links: Callable[[], list[LinkReport]] = list
        self.tiers: Callable[[], list[TierReport]] = list
        self._told_tiers: list[TierReport] = []
        groups = zip(scheduler.layout.groups, scheduler.pools, strict=True)
        sizes = [group.block_bytes * pool.num_blocks for group, pool in groups]
        self._group = sizes.index(max(sizes))

    def watch(self, message: Watch) -> None:
        """Somebody looks: send reports with details until the time given."""
        self._watch = message

    def stepped(self, num_rows: int, chunks: list[tuple[Request, Row]], seconds: float) -> None:
        """A step of `num_rows` rows ended; all but `chunks` computed one token."""
        self._num_steps += 1
        self._step_seconds += seconds
        num_tokens = sum(row.num_tokens for _, row in chunks)
        self._iteration_tokens.append(num_rows - len(chunks) + num_tokens)
        self._prefill_tokens += num_tokens
        self._changed = True

    def measured(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long."""
        if len(self._steps) < MAX_STEPS:
            self._steps.append((shape.num_tokens, shape.num_rows, shape.num_attended, shape.num_context, seconds))

    def due(self, now: float) -> Report | None:
        """A report if something changed and the last is old enough, or if a watcher waits for one."""
        watch = self._watch
        if watch is not None and now > watch.until_s:
            watch = self._watch = None
        interval = MIN_INTERVAL_S if watch is None else min(MIN_INTERVAL_S, watch.interval_s)
        if now - self._last_s < interval:
            return None
        if watch is None and not self._changed and self.tiers() == self._told_tiers:
            return None
        self._last_s = now
        report = self._report(now, watch is not None)
        hand_offs = report.handoffs
        in_flight = hand_offs is not None and hand_offs.num_sending + hand_offs.num_receiving > 0
        self._changed = self._scheduler.has_work or in_flight  # then a last one follows
        self._told_tiers = report.tiers  # a pool's change while nothing is computed
        return report

    def _report(self, now: float, detailed: bool) -> Report:
        scheduler = self._scheduler
        counters = scheduler.counters
        tokens, self._iteration_tokens = self._iteration_tokens, []
        steps, self._steps = self._steps, []
        reasons = Counter(request.queue_reason or "capacity" for request in scheduler.waiting)
        guests = Counter(r.queue_reason or "capacity" for r in scheduler.waiting if r.ticket is not None)
        return Report(
            now_s=now,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            waiting_by_reason=dict(reasons),
            kv=self._kv(detailed),
            num_steps_total=self._num_steps,
            step_seconds_total=self._step_seconds,
            prompt_tokens_total=counters.prompt_tokens,
            prompt_tokens_cached_total=counters.prompt_tokens_cached,
            generation_tokens_total=counters.generation_tokens,
            num_preemptions_total=counters.num_preemptions,
            prefix_queries_total=counters.prefix_queries,
            prefix_hits_total=counters.prefix_hits,
            iteration_tokens=tokens,
            requests=self._records() if detailed else [],
            name=self.name,
            role=self.role,
            guests_running=sum(request.ticket is not None for request in scheduler.running),
            guests_waiting_by_reason=dict(guests),
            prompt_tokens_by_source=dict(self._timeline.by_source),
            prefill_tokens_total=self._prefill_tokens,
            handoffs=self.handoffs(),
            links=self.links(),
            tiers=self.tiers(),
            steps=steps,
        )

    def _records(self) -> list[RequestRecord]:
        scheduler = self._scheduler
        live: list[Request] = []
        for requests in (scheduler.running, scheduler.waiting):
            own = [request for request in requests if request.ticket is None]
            live += sorted(own, key=lambda request: request.arrival_s)
        return [self._timeline.record(request) for request in live[:MAX_RECORDS]]

    def _kv(self, detailed: bool) -> KVReport:
        scheduler, pool, size = self._scheduler, self._scheduler.pools[self._group], self._scheduler.block_size
        filling: set[int] = set()
        for request in scheduler.running:
            filling.update(request.block_tables[self._group][request.num_computed // size :])
        filling.discard(0)
        counts = {"shared": pool.num_shared, "filling": len(filling), "cached": pool.num_cached}
        used = pool.num_held - pool.num_shared - len(filling)
        free = pool.num_blocks - 1 - used - sum(counts.values())
        report = KVReport(size, pool.num_blocks - 1, used, counts["shared"], counts["filling"], counts["cached"], free)
        if not detailed:
            return report
        num_cells, each, cells = _cells(pool, filling)
        return msgspec.structs.replace(report, num_cells=num_cells, blocks_per_cell=each, cells=cells)


def _cells(pool: BlockPool, filling: set[int]) -> tuple[int, int, str]:
    """(number of cells, blocks per cell, run-length coded states in order of block id)."""
    num_blocks = pool.num_blocks - 1
    each = -(-num_blocks // MAX_CELLS)
    letters = []
    for block in pool.blocks[1:]:
        if block.num_refs == 0:
            letters.append("." if block.hash is None or block.fence >= 0 else "c")
        elif block.id in filling:
            letters.append("f")
        else:
            letters.append("s" if block.num_refs > 1 else "u")
    if each > 1:
        order = "fsuc."
        letters = [min(letters[i : i + each], key=order.index) for i in range(0, num_blocks, each)]
    runs: list[str] = []
    start = 0
    for i in range(1, len(letters) + 1):
        if i == len(letters) or letters[i] != letters[start]:
            runs.append(f"{letters[start]}{i - start}")
            start = i
    return len(letters), each, "".join(runs)
