"""Who goes first, who gives way. Pure functions of requests and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.core.request import Request


class FcfsPolicy:
    """First come, first served; the request with the least computed gives way, for it is the cheapest to redo."""

    def order(self, requests: Iterable[Request], now: float) -> list[Request]:
        return sorted(requests, key=lambda r: (r.arrival_s, r.id))

    def victim(self, candidates: Sequence[Request], now: float) -> Request:
        return min(candidates, key=lambda r: (r.num_computed, -r.arrival_s, r.id))


class PriorityPolicy:
    """Lower `priority` first, then first come; the least urgent gives way, among equals the least computed."""

    def order(self, requests: Iterable[Request], now: float) -> list[Request]:
        return sorted(requests, key=lambda r: (r.priority, r.arrival_s, r.id))

    def victim(self, candidates: Sequence[Request], now: float) -> Request:
        return min(candidates, key=lambda r: (-r.priority, r.num_computed, -r.arrival_s, r.id))


POLICIES = {"fcfs": FcfsPolicy, "priority": PriorityPolicy}
