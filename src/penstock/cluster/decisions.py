"""The router's memory of its last decisions: where each request went, what was expected, and what came of it.

Bookkeeping only; plain data out. Knows no clock and no policy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

MAX_DECISIONS = 1000


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a policy expected of its choice. `terms` in milliseconds, or in the unit that the policy counts in.

    `ttft_s`: None where the policy predicts no time. `runner_ups`: (engine, score) of those that were not chosen.
    """

    reason: str = ""
    ttft_s: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    runner_ups: tuple[tuple[str, float], ...] = ()
    hit_tokens: int | None = None
    new_tokens: int | None = None


NO_FORECAST = Forecast()


@dataclass(slots=True)
class Decision:
    """One request's way. Times in seconds of the router's clock; written by Decisions alone."""

    request_id: str
    at_s: float
    arrival_s: float
    prompt_tokens: int
    engine: str
    prefill_at: tuple[str, ...]
    forecast: Forecast
    num_tries: int = 1
    ttft_s: float | None = None  # from arrival
    outcome: str = "running"  # or how it ended


class Decisions:
    """The newest 1,000, one per request: a request whose engine died is decided again."""

    def __init__(self) -> None:
        self.num_made = 0
        self._all: OrderedDict[str, Decision] = OrderedDict()

    def placed(
        self,
        request_id: str,
        arrival_s: float,
        prompt_tokens: int,
        engine: str,
        prefill_at: tuple[str, ...],
        forecast: Forecast,
        now: float,
        num_tries: int,
    ) -> None:
        """A request goes to `engine`. `num_tries`: counts from 1."""
        self.num_made += 1
        before = self._all.pop(request_id, None)
        ttft_s = before.ttft_s if before is not None and num_tries > 1 else None
        self._all[request_id] = Decision(
            request_id, now, arrival_s, prompt_tokens, engine, prefill_at, forecast, num_tries, ttft_s
        )
        if len(self._all) > MAX_DECISIONS:
            self._all.popitem(last=False)

    def first_token(self, request_id: str, now: float) -> None:
        decision = self._all.get(request_id)
        if decision is not None and decision.ttft_s is None:
            decision.ttft_s = now - decision.arrival_s

    def ended(self, request_id: str, outcome: str) -> None:
        decision = self._all.get(request_id)
        if decision is not None:
            decision.outcome = outcome

    def engine_of(self, request_id: str) -> str:
        """Who decodes it, or did; "" once it is forgotten."""
        decision = self._all.get(request_id)
        return "" if decision is None else decision.engine

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """One decision as plain data."""
        decision = self._all.get(request_id)
        return None if decision is None else _plain(decision)

    def recent(self, number: int) -> list[dict[str, Any]]:
        """The newest ones, newest first."""
        return [_plain(decision) for decision in islice(reversed(self._all.values()), number)]


def _plain(decision: Decision) -> dict[str, Any]:
    forecast = decision.forecast
    return {
        "request_id": decision.request_id,
        "at_s": decision.at_s,
        "prompt_tokens": decision.prompt_tokens,
        "engine": decision.engine,
        "prefill_at": list(decision.prefill_at),
        "reason": forecast.reason,
        "predicted_ttft_s": forecast.ttft_s,
        "terms": {name: float(value) for name, value in forecast.terms.items()},
        "runner_ups": [{"engine": engine, "score": float(score)} for engine, score in forecast.runner_ups],
        "hit_tokens": forecast.hit_tokens,
        "new_tokens": forecast.new_tokens,
        "num_tries": decision.num_tries,
        "ttft_s": decision.ttft_s,
        "outcome": decision.outcome,
    }
