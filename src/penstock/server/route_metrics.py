"""/metrics of a router of its own: what it decided, how long that took, and which engines are there."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from penstock.cluster.dispatcher import Dispatcher
from penstock.cluster.router import Placed
from penstock.server.route_engines import RemoteEngine

DECISION_S = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)


class RouteMetrics:
    """Counts of one router, in a registry of its own."""

    def __init__(self, engines: Collection[RemoteEngine], dispatcher: Dispatcher) -> None:
        self._engines, self._dispatcher = engines, dispatcher
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"penstock:route_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"penstock:route_{name}", text, labels, registry=registry)

        self._placed = counter("placed", "Requests by the engine that decodes them.", "engine")
        self._prefills = counter("prefills", "Prompts by the engine that computes them for another one.", "engine")
        self._retried = counter("retries", "Requests that an engine did not answer and another one got.", "engine")
        self._ended = counter("requests", "Requests by how they ended.", "outcome")
        self._hits = counter("hit_tokens", "Prompt tokens that the chosen engine was believed to hold.")
        self._seconds = Histogram(
            "penstock:route_decision_seconds", "Time of one decision.", buckets=DECISION_S, registry=registry
        )
        self._up = gauge("engine_up", "Whether an engine answers.", "engine", "role")
        self._blocks = gauge("known_blocks", "Blocks that an engine holds, by its events.", "engine")
        self._gaps = gauge(
            "event_gaps", "Times that events of an engine were missed, since the router's start.", "engine"
        )

    def placed(self, placed: Placed, seconds: float) -> None:
        """A decision that took `seconds`."""
        self._seconds.observe(seconds)
        self._placed.labels(placed.engine).inc()
        self._hits.inc(placed.forecast.hit_tokens or 0)
        for name in placed.prefill_at[:1]:
            self._prefills.labels(name).inc()

    def retried(self, engine: str) -> None:
        self._retried.labels(engine).inc()

    def ended(self, outcome: str) -> None:
        self._ended.labels(outcome).inc()

    def render(self) -> tuple[bytes, str]:
        """The text and its content type."""
        for engine in self._engines:
            self._up.labels(engine.name, engine.address.role).set(engine.is_up)
        for name, cache in self._dispatcher.caches.items():
            self._blocks.labels(name).set(cache.num_blocks)
            self._gaps.labels(name).set(cache.num_gaps)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
