"""Engines that change their role: what each role needs is measured in windows, and one engine at a time moves over.

Every engine can do both phases; a role is what the router gives it. So a change is: nothing new in the old role, a
while for what runs to end, a probe that shows that it still answers, and it is there in the new one. Sends nothing
itself; knows reports and the cost model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from penstock.core.cost import FittedCost, StepShape
from penstock.core.request import SamplingParams
from penstock.core.scaling import DECODE, PREFILL, RoleScaler, ScalingLimits, Signals, Window
from penstock.engine.messages import AddRequest, Ready, Report

log = logging.getLogger("penstock.roles")

PROBE = "probe:"  # request ids of probes begin with it
PROBE_CHUNK = 1024  # tokens of a prompt by which an engine's rate is predicted
MAX_BATCH = 1024


class Seen(Protocol):
    """An engine as a router knows it."""

    name: str
    role: str
    ready: Ready | None
    report: Report | None


@dataclass(slots=True)
class _Change:
    role: str
    since_s: float
    probed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """What the router is to do: `leave` the old role, `probe`, `join` the new one, or `stay` in the old one."""

    what: str
    engine: str
    role: str
    probe: AddRequest | None = None


class RoleKeeper:
    """`tick` some ten times a second. `signals`: of the last window, for an outer autoscaler, too.

    `may_change` False: it measures, and every engine keeps its role.
    """

    def __init__(
        self,
        cost: FittedCost,
        limits: ScalingLimits | None = None,
        tpot_slo_s: float = 0.05,
        drain_s: float = 30.0,
        may_change: bool = True,
    ) -> None:
        self.cost = cost
        self.limits = limits or ScalingLimits()
        self.tpot_slo_s, self.drain_s, self.may_change = tpot_slo_s, drain_s, may_change
        self.signals: Signals | None = None
        self.num_changes = 0
        self._scaler = RoleScaler(self.limits)
        self._changes: dict[str, _Change] = {}
        self._begin_s: float | None = None
        self._totals: dict[str, tuple[int, int]] = {}  # prompt tokens computed, tokens given
        self._answered: set[str] = set()

    def answered(self, request_id: str) -> None:
        """A probe has come back with a token."""
        self._answered.add(request_id.removeprefix(PROBE))

    def lost(self, name: str) -> None:
        """The engine is gone: it comes back in the role that it had."""
        self._changes.pop(name, None)
        self._totals.pop(name, None)

    def tick(self, engines: Mapping[str, Seen], now: float) -> list[Moved]:
        """What is to be done now."""
        if self._begin_s is None:
            self._begin_s = now
            self._remember(engines)
        moves = [
            moved for name, change in list(self._changes.items()) for moved in self._go_on(engines, name, change, now)
        ]
        if now - self._begin_s >= self.limits.window_s:
            window = self.window(engines, now - self._begin_s)
            self._begin_s = now
            self._remember(engines)
            self.signals = self._scaler.observe(window, now)
            if self.signals.flip is not None and self.may_change and not self._changes:
                moves += self._begin(engines, *self.signals.flip, now)
        return moves

    def window(self, engines: Mapping[str, Seen], seconds: float) -> Window:
        """What the last `seconds` were, by the engines' reports."""
        reports = {name: engine.report for name, engine in engines.items() if engine.report is not None}
        decoding = [report for name, report in reports.items() if engines[name].role == DECODE]
        gains = [
            (report.prefill_tokens_total - before[0], report.generation_tokens_total - before[1])
            for name, report in reports.items()
            for before in [self._totals.get(name, (0, 0))]
        ]
        roles = [engine.role for engine in engines.values() if engine.ready is not None]
        kv = [report.kv for report in decoding]
        resident = sum((each.used + each.shared + each.filling) * each.block_size for each in kv)
        running = sum(report.num_running for report in decoding)
        slots = sum(e.ready.max_num_seqs for e in engines.values() if e.role == DECODE and e.ready is not None)
        context = resident // max(running, 1)
        decode_tokens_per_s, step_s = self._decode_rate(context)
        return Window(
            num_prefill=roles.count(PREFILL),
            num_decode=roles.count(DECODE),
            new_tokens_per_s=sum(max(0, new) for new, _ in gains) / seconds,
            output_tokens_per_s=sum(max(0, out) for _, out in gains) / seconds,
            prefill_tokens_per_s=PROBE_CHUNK / max(self.cost.prefill_seconds(PROBE_CHUNK, 0), 1e-9),
            decode_tokens_per_s=decode_tokens_per_s,
            resident_tokens=float(resident),
            decode_capacity_tokens=float(min((each.num_blocks * each.block_size for each in kv), default=0)),
            num_running=running,
            free_slots=max(0, slots - running),
            step_rate=1.0 / max(step_s, 1e-9),
        )

    def _decode_rate(self, context: int) -> tuple[float, float]:
        """(tokens a second of the largest batch within the SLO, its step's seconds)."""
        best, batch = (0.0, self.tpot_slo_s), 1
        while batch <= MAX_BATCH:
            step_s = self.cost.step_seconds(StepShape(batch, batch, batch * context, batch * context))
            if batch > 1 and step_s > self.tpot_slo_s:
                break
            best = (batch / max(step_s, 1e-9), step_s)
            batch *= 2
        return best

    def _remember(self, engines: Mapping[str, Seen]) -> None:
        for name, engine in engines.items():
            if engine.report is not None:
                self._totals[name] = (engine.report.prefill_tokens_total, engine.report.generation_tokens_total)

    def _begin(self, engines: Mapping[str, Seen], donor: str, role: str, now: float) -> list[Moved]:
        """The least busy engine of the role that can spare one leaves it."""
        able = [e for e in engines.values() if e.role == donor and e.ready is not None]
        if len(able) < 2:
            return []
        chosen = min(able, key=lambda e: (0 if e.report is None else e.report.num_running, e.name))
        self._changes[chosen.name] = _Change(role, now)
        log.warning("%s leaves role %s for %s: %s", chosen.name, donor, role, self.signals and self.signals.why)
        return [Moved("leave", chosen.name, role)]

    def _go_on(self, engines: Mapping[str, Seen], name: str, change: _Change, now: float) -> list[Moved]:
        engine = engines.get(name)
        if engine is None or engine.ready is None:
            self.lost(name)
            return []
        if change.probed_s is None:
            report = engine.report
            is_idle = report is not None and report.num_running == 0 and report.num_waiting == 0
            if not is_idle and now - change.since_s < self.drain_s:
                return []
            change.probed_s = now
            self._answered.discard(name)
            probe = AddRequest(PROBE + name, [0, 1, 2, 3], SamplingParams(max_tokens=1), 0, now)
            return [Moved("probe", name, change.role, probe)]
        if name in self._answered:
            del self._changes[name]
            self.num_changes += 1
            log.warning("%s is a %s engine from now on", name, change.role)
            return [Moved("join", name, change.role)]
        if now - change.probed_s > self.drain_s:
            del self._changes[name]
            log.error("%s does not answer its probe: it stays a %s engine", name, engine.role)
            return [Moved("stay", name, engine.role)]
        return []
