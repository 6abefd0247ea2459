"""Prometheus metrics under vLLM's names: an observer of the front end that counts, and renders text when scraped.

Names, labels, meanings and bucket boundaries are those of vLLM's V1 engine (vllm/v1/metrics/loggers.py and stats.py),
so that its dashboards, routers and autoscalers work unchanged; `docs/page.md` has the table. A token must cost far
less than two microseconds, so counting is plain integers (`metric_counts`); prometheus-client does what must not be
written by hand: the text format.

Knows the messages of the engine. Knows no HTTP, no prompt text, and not who scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from penstock.cluster.roles import RoleKeeper
from penstock.config.kv_pool import remote_name
from penstock.config.schema import CacheOptions
from penstock.core.request import SamplingParams
from penstock.engine.messages import FromEngine, Ready, Report, RequestRecord
from penstock.server.metric_cluster import cluster_families, scaling_families
from penstock.server.metric_counts import TOKEN_TIME_BUCKETS, EngineCounts, Histogram, one_two_five

# vLLM knows two reasons to wait: no room, or something the request needs is not there yet.
ROOM_REASONS = frozenset({"capacity", "budget", "slots", "preempted"})
# vLLM's name for a full queue; other reasons (loading, draining, dead) keep the front end's.
REJECTIONS = {"queue_full": "max_num_queued_reqs"}
# vLLM's names for where a prompt token's KV came from, and ours.
SOURCES = {
    "local_compute": ("compute",),
    "local_cache_hit": ("device",),
    "external_kv_transfer": ("peer", "host", "disk", "remote"),
}
CACHED = ("device", *SOURCES["external_kv_transfer"])
TIERS = {"host": "host", "disk": "disk", "external_unspecified": "remote"}

Sample = tuple[dict[str, str], float]


class _InFlight:
    """What is remembered of a request between its first and its last message. Times in seconds, engine's clock."""

    __slots__ = ("counts", "first_s", "last_s", "max_tokens", "num_prompt_tokens", "num_tokens", "received_s")

    def __init__(self, counts: EngineCounts, received_s: float, num_prompt_tokens: int, max_tokens: int | None) -> None:
        self.counts = counts
        self.received_s = received_s
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.first_s: float | None = None
        self.last_s = 0.0


class Metrics(Collector):
    """An observer of the front end, and a collector of prometheus-client's. One thread calls everything.

    `model_name` is the first served name; `engine` the index of the engine, a string as in vLLM. Where there are
    several they count from 0 in the order in which Ready names them, and `engine_of` says which one a request is
    decoded by. `roles` knows how many engines each role needs. The buckets of token counts end at the model's length
    limit, so they are made when Ready says it.
    """

    def __init__(
        self,
        model_name: str,
        cache: CacheOptions,
        prefix: str = "vllm",
        engine: str = "0",
        engine_of: Callable[[str], str] = lambda request_id: "",
        roles: RoleKeeper | None = None,
    ) -> None:
        self.prefix = prefix
        self.cache = cache
        self._model_name = model_name
        self._engine_of = engine_of
        self._roles = roles
        self.ready: Ready | None = None
        self._bounds = one_two_five(1 << 20)
        self._default = self._new_counts(engine)  # for what belongs to no engine that is known
        self._engines: dict[str, EngineCounts] = {"": self._default}
        self.rejections = dict.fromkeys(REJECTIONS.values(), 0)
        self._requests: dict[str, _InFlight] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _new_counts(self, engine: str) -> EngineCounts:
        return EngineCounts({"model_name": self._model_name, "engine": engine}, self._bounds)

    # ---- observer ----

    def received(self, request_id: str, num_prompt_tokens: int, params: SamplingParams, now: float) -> None:
        """A sample was sent to the engine; samples of one request share its parameters, and count once for `n`."""
        counts = self._engines.get(self._engine_of(request_id), self._default)
        self._requests[request_id] = _InFlight(counts, now, num_prompt_tokens, params.max_tokens)
        if params.n == 1 or request_id.endswith(".0"):
            counts.params_n.observe(params.n)

    def emitted(self, request_id: str, num_new_tokens: int, now: float) -> None:
        """Tokens of one step reached the front end. One gap is observed however many they are, as in vLLM."""
        if not num_new_tokens:
            return
        live = self._requests.get(request_id)
        if live is None:
            self._default.generation_tokens += num_new_tokens
            return
        counts = live.counts
        counts.generation_tokens += num_new_tokens
        if live.num_tokens:
            gap = now - live.last_s
            itl = counts.itl
            itl.counts[bisect_left(TOKEN_TIME_BUCKETS, gap)] += 1
            itl.total += gap
        else:
            live.first_s = now
            counts.ttft.observe(now - live.received_s)
        live.num_tokens += num_new_tokens
        live.last_s = now

    def finished(self, request_id: str, record: RequestRecord | None, finish_reason: str, now: float) -> None:
        """A request ended, with the engine's record where the engine lived to send one."""
        live = self._requests.pop(request_id, None)
        counts = self._default if live is None else live.counts
        counts.success[finish_reason] = counts.success.get(finish_reason, 0) + 1
        if live is None:
            return
        counts.e2e.observe(now - live.received_s)
        counts.prompt_tokens.observe(live.num_prompt_tokens)
        counts.output_tokens.observe(live.num_tokens)
        if live.max_tokens:
            counts.params_max_tokens.observe(live.max_tokens)
        if live.first_s is not None:
            decode_s = live.last_s - live.first_s
            counts.decode.observe(decode_s)
            # The first token belongs to the prompt's time; 0 for a single token, as in vLLM.
            counts.tpot.observe(decode_s / (live.num_tokens - 1) if live.num_tokens > 1 else 0.0)
        if record is None or record.admitted_s is None:
            return
        counts.queue.observe(max(0.0, record.admitted_s - record.arrival_s))
        counts.computed_tokens.observe(record.prompt_tokens - record.cached_tokens)
        if live.first_s is not None:
            counts.prefill.observe(max(0.0, live.first_s - record.admitted_s))
            counts.inference.observe(max(0.0, live.last_s - record.admitted_s))

    def rejected(self, reason: str, now: float) -> None:
        """A request was turned away before it reached the engine."""
        reason = REJECTIONS.get(reason, reason)
        self.rejections[reason] = self.rejections.get(reason, 0) + 1

    def message(self, message: FromEngine, now: float) -> None:
        """Anything the engine says; Report and Ready are of interest here."""
        if type(message) is Report:
            self._take(message)
        elif type(message) is Ready:
            self._start(message)

    def _start(self, ready: Ready) -> None:
        first, self.ready = self.ready is None, ready
        if not first:
            return
        self._bounds = one_two_five(ready.max_model_len)
        names = [(each.peer.name, each.peer.role) for each in ready.engines if each.peer is not None]
        if names:
            self._engines = {name: self._new_counts(str(number)) for number, (name, _) in enumerate(names)}
            self._default = next(self._engines[name] for name, role in names if role != "prefill")
        else:
            self._engines[""] = self._default = self._new_counts(self._default.labels["engine"])

    def _take(self, report: Report) -> None:
        for each in report.engines or [report]:
            counts = self._engines.get(each.name if report.engines else "", self._default)
            counts.take(each)
        newest = self._engines.get(report.name, self._default)
        for num_tokens in report.iteration_tokens:
            newest.iteration_tokens.observe(num_tokens)

    # ---- output ----

    def render(self) -> tuple[bytes, str]:
        """The whole text for a scrape, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def describe(self) -> Iterable[Metric]:
        """Nothing: it keeps prometheus-client from collecting at registration to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All families, as prometheus-client wants them."""
        engines = list(self._engines.values())
        yield from self._gauges()
        yield from self._counters()
        names = tuple(self._default.labels)
        for name, text, attribute in HISTOGRAMS:
            family = HistogramMetricFamily(f"{self.prefix}:{name}", text, labels=names)
            for counts in engines:
                histogram: Histogram = getattr(counts, attribute)
                family.add_metric(tuple(counts.labels.values()), histogram.cumulative(), histogram.total)
            yield family
        yield from cluster_families(engines, self.prefix)
        if self._roles is not None:
            yield from scaling_families(self._roles.signals, self._roles.num_changes, self._default.labels)

    def _gauge(self, name: str, text: str, values: Callable[[EngineCounts], Iterable[Sample]]) -> Metric:
        family = GaugeMetricFamily(f"{self.prefix}:{name}", text)
        for counts in self._engines.values():
            for labels, value in values(counts):
                family.add_sample(family.name, {**counts.labels, **labels}, value)
        return family

    def _counter(self, name: str, text: str, values: Callable[[EngineCounts], Iterable[Sample]]) -> Metric:
        family = CounterMetricFamily(f"{self.prefix}:{name}", text)
        for counts in self._engines.values():
            for labels, value in values(counts):
                family.add_sample(family.name + "_total", {**counts.labels, **labels}, value)
        return family

    def _gauges(self) -> Iterable[Metric]:
        if any(counts.report is not None for counts in self._engines.values()):
            for name, text, values in GAUGES:
                yield self._gauge(name, text, values)
        ready = self.ready
        if ready is None:
            return
        family = GaugeMetricFamily(f"{self.prefix}:cache_config_info", "Information of the KV cache's configuration.")
        for counts, each in zip(self._engines.values(), ready.engines or [ready], strict=False):
            labels = {
                "block_bytes": str(each.block_bytes),
                "block_size": str(each.block_size),
                "cache_dtype": self.cache.kv_cache_dtype,
                "enable_prefix_caching": str(self.cache.enable_prefix_caching),
                "gpu_memory_utilization": str(self.cache.gpu_memory_utilization),
                "kv_pool": self.cache.kv_pool_listen or "",
                "kv_remote": remote_name(self.cache.kv_remote_url or ""),
                "num_gpu_blocks": str(each.num_blocks),
            }
            family.add_sample(family.name, {**counts.labels, **labels}, 1)
        yield family

    def _counters(self) -> Iterable[Metric]:
        for name, text in (
            ("prompt_tokens", "Number of prefill tokens processed."),
            ("num_preemptions", "Cumulative number of preemptions."),
            ("prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens."),
            ("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens."),
        ):
            yield self._counter(name, text, lambda c, name=name: [({}, c.total(name))])  # type: ignore[misc]
        yield self._counter(
            "prompt_tokens_cached",
            "Number of cached prompt tokens (local + external).",
            lambda c: [({}, _from(c, CACHED))],
        )
        yield self._counter(
            "prompt_tokens_by_source",
            "Number of prompt tokens by where their keys and values came from.",
            lambda c: [({"source": name}, _from(c, places)) for name, places in SOURCES.items()],
        )
        yield self._counter(
            "prompt_tokens_cached_by_source",
            "Number of cached prompt tokens by the tier that supplied them; p2p: another engine.",
            _cached_by_source,
        )
        yield self._counter(
            "generation_tokens", "Number of generation tokens processed.", lambda c: [({}, c.generation_tokens)]
        )
        yield self._counter(
            "request_success",
            "Count of finished requests by reason.",
            lambda c: [({"finished_reason": reason}, number) for reason, number in c.success.items()],
        )
        rejections = [({"reason": reason}, float(number)) for reason, number in self.rejections.items()]
        yield self._counter(
            "admission_rejections",
            "Number of requests refused at admission, by reason.",
            lambda c: rejections if c is self._default else [],
        )


def _waiting_by_reason(counts: EngineCounts) -> list[Sample]:
    reasons = {"capacity": 0, "deferred": 0}
    if counts.report is None:
        return []
    for reason, number in counts.report.waiting_by_reason.items():
        reasons["capacity" if reason in ROOM_REASONS else "deferred"] += number
    return [({"reason": reason}, number) for reason, number in reasons.items()]


def _usage(counts: EngineCounts) -> list[Sample]:
    if counts.report is None:
        return []
    kv = counts.report.kv
    return [({}, (kv.used + kv.shared + kv.filling) / kv.num_blocks if kv.num_blocks else 0.0)]


def _from(counts: EngineCounts, places: Iterable[str]) -> float:
    return sum(counts.total("source", place) for place in places)


def _cached_by_source(counts: EngineCounts) -> list[Sample]:
    """Of what came from tiers, as many tokens as the blocks have that each says it gave."""
    size = 0 if counts.report is None else counts.report.kv.block_size
    tiers = {name: size * counts.total("tier", "hit_blocks", tier) for name, tier in TIERS.items()}
    numbers = {"device": counts.total("source", "device"), "p2p": counts.total("source", "peer"), **tiers}
    return [({"source": name}, number) for name, number in numbers.items()]


GAUGES: tuple[tuple[str, str, Callable[[EngineCounts], list[Sample]]], ...] = (
    (
        "num_requests_running",
        "Number of requests in model execution batches.",
        lambda c: [] if c.report is None else [({}, c.report.num_running)],
    ),
    (
        "num_requests_waiting",
        "Number of requests waiting to be processed.",
        lambda c: [] if c.report is None else [({}, c.report.num_waiting)],
    ),
    (
        "num_requests_waiting_by_reason",
        "Number of waiting requests: for lack of room (capacity), or of something they need (deferred).",
        _waiting_by_reason,
    ),
    ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", _usage),
)

HISTOGRAMS = (
    ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", "ttft"),
    ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", "itl"),
    (
        "request_time_per_output_token_seconds",
        "Histogram of time per output token of a request in seconds, the first token left out.",
        "tpot",
    ),
    ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", "e2e"),
    ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", "queue"),
    ("request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", "prefill"),
    ("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", "decode"),
    ("request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request.", "inference"),
    ("request_prompt_tokens", "Number of prefill tokens processed, per request.", "prompt_tokens"),
    ("request_generation_tokens", "Number of generation tokens processed, per request.", "output_tokens"),
    ("request_params_n", "Histogram of the n request parameter.", "params_n"),
    ("request_params_max_tokens", "Histogram of the max_tokens request parameter.", "params_max_tokens"),
    ("iteration_tokens_total", "Histogram of number of tokens per engine_step.", "iteration_tokens"),
    (
        "request_prefill_kv_computed_tokens",
        "Histogram of prompt tokens whose KV was computed, not taken from a cache, per request.",
        "computed_tokens",
    ),
)
