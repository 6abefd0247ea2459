"""Who goes first, who gives way. Pure functions of requests and time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from penstock.core.doors import SchedulePolicy
from penstock.core.request import Request


class FcfsPolicy:
    """First come, first served; the request with the least computed gives way, for it is the cheapest to redo."""

    ages = False

    def order(self, requests: Iterable[Request], now: float) -> list[Request]:
        return sorted(requests, key=lambda r: (r.arrival_s, r.id))

    def victim(self, candidates: Sequence[Request], now: float) -> Request:
        return min(candidates, key=lambda r: (r.num_computed, -r.arrival_s, r.id))


class PriorityPolicy:
    """Lower `priority` first, then first come; the least urgent gives way, among equals the least computed."""

    ages = False

    def order(self, requests: Iterable[Request], now: float) -> list[Request]:
        return sorted(requests, key=lambda r: (r.priority, r.arrival_s, r.id))

    def victim(self, candidates: Sequence[Request], now: float) -> Request:
        return min(candidates, key=lambda r: (-r.priority, r.num_computed, -r.arrival_s, r.id))


class SjfAgedPolicy:
    """The shortest work first, made older by waiting; who may miss a deadline goes ahead of all, the tightest first.

    Work is predicted by `seconds(new tokens, tokens computed)`. Ageing subtracts `weight` times the wait, so a long
    prompt is overtaken only by those that came soon after it. Urgent is who has less than `guard_s` left after the
    predicted work, or has waited for half of the TTFT SLO. Who has begun to answer keeps its place: first come first.
    Source: Tencent's Angel-HCF orders prompts by length; Sarathi-Serve's deadline lane.
    """

    ages = True

    def __init__(
        self,
        seconds: Callable[[int, int], float] | None = None,
        *,
        ttft_slo_s: float = 2.0,
        weight: float = 1.0,
        guard_s: float = 0.1,
    ) -> None:
        self.seconds = seconds or (lambda new, computed: 1e-4 * new)
        self.ttft_slo_s = ttft_slo_s
        self.weight = weight
        self.guard_s = guard_s

    def order(self, requests: Iterable[Request], now: float) -> list[Request]:
        return sorted(requests, key=lambda r: self._key(r, now))

    def _key(self, request: Request, now: float) -> tuple[int, float, float, str]:
        if request.num_output:
            return 0, 0.0, request.arrival_s, request.id
        waited = now - request.arrival_s
        new = max(1, len(request.token_ids) - request.num_computed)
        predicted = self.seconds(new, request.num_computed)
        deadline = request.arrival_s + self.ttft_slo_s
        if request.deadline_s is not None:
            deadline = min(deadline, request.deadline_s)
        if deadline - now - predicted < self.guard_s or waited > 0.5 * self.ttft_slo_s:
            return 1, deadline, request.arrival_s, request.id
        return 2, predicted - self.weight * waited, request.arrival_s, request.id

    def victim(self, candidates: Sequence[Request], now: float) -> Request:
        return min(candidates, key=lambda r: (r.num_computed, -r.arrival_s, r.id))


POLICIES: dict[str, Callable[[], SchedulePolicy]] = {
    "fcfs": FcfsPolicy,
    "priority": PriorityPolicy,
    "sjf_aged": SjfAgedPolicy,
}
