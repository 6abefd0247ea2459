"""Prometheus metrics under vLLM's names: an observer of the front end that counts, and renders text when scraped.

Names, labels, meanings and bucket boundaries are those of vLLM's V1 engine (vllm/v1/metrics/loggers.py and stats.py),
so that its dashboards, routers and autoscalers work unchanged; `docs/page.md` has the table. Counting is plain
integers and `bisect`: prometheus-client's `observe` costs several microseconds, and a token must cost far less than
two. Prometheus-client does what must not be written by hand: the text format.

Knows the messages of the engine. Knows no HTTP, no prompt text, and not who scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

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
from prometheus_client.utils import floatToGoString

from penstock.config.schema import CacheOptions
from penstock.core.request import FINISH_ABORT, FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, SamplingParams
from penstock.engine.messages import FromEngine, Ready, Report, RequestRecord

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_TIME_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_TIME_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PARAMS_N_BUCKETS = (1, 2, 5, 10, 20)

# vLLM knows two reasons to wait: no room, or something the request needs is not there yet.
ROOM_REASONS = frozenset({"capacity", "budget", "slots", "preempted"})
# vLLM's name for a full queue; other reasons (loading, draining, dead) keep the front end's.
REJECTIONS = {"queue_full": "max_num_queued_reqs"}
# vLLM's names for where a prompt token's KV came from; the third needs another machine or tier.
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")


def one_two_five(limit: int) -> tuple[int, ...]:
    """vLLM's buckets for token counts: 1, 2, 5, 10, 20, 50 ... as far as `limit`.

    >>> one_two_five(100)
    (1, 2, 5, 10, 20, 50, 100)
    """
    buckets: list[int] = []
    power = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * power > limit:
                return tuple(buckets)
            buckets.append(mantissa * power)
        power *= 10


class Histogram:
    """Counts per bucket, not cumulative, and the sum. An observation costs about 0.2 us."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count `value`; a value on a boundary belongs to the bucket that ends there (`le`)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it) pairs, the last one +Inf."""
        names = [floatToGoString(bound) for bound in (*self.bounds, float("inf"))]  # type: ignore[no-untyped-call]
        return list(zip(names, accumulate(self.counts), strict=True))


class _InFlight:
    """What is remembered of a request between its first and its last message. Times in seconds, engine's clock."""

    __slots__ = ("first_s", "last_s", "max_tokens", "num_prompt_tokens", "num_tokens", "received_s")

    def __init__(self, received_s: float, num_prompt_tokens: int, max_tokens: int | None) -> None:
        self.received_s = received_s
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.first_s: float | None = None
        self.last_s = 0.0


class Metrics(Collector):
    """An observer of the front end, and a collector of prometheus-client's. One thread calls everything.

    `model_name` is the first served name; `engine` the index of the engine, a string as in vLLM. The buckets of token
    counts end at the model's length limit, so they are made when Ready says it.
    """

    def __init__(self, model_name: str, cache: CacheOptions, prefix: str = "vllm", engine: str = "0") -> None:
        self.prefix = prefix
        self.cache = cache
        self.labels = {"model_name": model_name, "engine": engine}
        self.ready: Ready | None = None
        self.report: Report | None = None
        self.generation_tokens = 0
        self.engine_totals: dict[str, int] = {}  # counters that Reports carry, summed over restarts of the engine
        self._reported: dict[str, int] = {}
        self.success = dict.fromkeys((FINISH_STOP, FINISH_LENGTH, FINISH_ABORT, FINISH_ERROR), 0)
        self.rejections = dict.fromkeys(REJECTIONS.values(), 0)
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(TOKEN_TIME_BUCKETS)
        self.tpot = Histogram(TOKEN_TIME_BUCKETS)
        self.e2e = Histogram(REQUEST_TIME_BUCKETS)
        self.queue = Histogram(REQUEST_TIME_BUCKETS)
        self.prefill = Histogram(REQUEST_TIME_BUCKETS)
        self.decode = Histogram(REQUEST_TIME_BUCKETS)
        self.inference = Histogram(REQUEST_TIME_BUCKETS)
        self.iteration_tokens = Histogram(ITERATION_BUCKETS)
        self.params_n = Histogram(PARAMS_N_BUCKETS)
        self._size_by_tokens(one_two_five(1 << 20))
        self._requests: dict[str, _InFlight] = {}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _size_by_tokens(self, bounds: Sequence[int]) -> None:
        self.prompt_tokens = Histogram(bounds)
        self.output_tokens = Histogram(bounds)
        self.params_max_tokens = Histogram(bounds)
        self.computed_tokens = Histogram(bounds)

    # ---- observer ----

    def received(self, request_id: str, num_prompt_tokens: int, params: SamplingParams, now: float) -> None:
        """A sample was sent to the engine; samples of one request share its parameters, and count once for `n`."""
        self._requests[request_id] = _InFlight(now, num_prompt_tokens, params.max_tokens)
        if params.n == 1 or request_id.endswith(".0"):
            self.params_n.observe(params.n)

    def emitted(self, request_id: str, num_new_tokens: int, now: float) -> None:
        """Tokens of one step reached the front end. One gap is observed however many they are, as in vLLM."""
        if not num_new_tokens:
            return
        self.generation_tokens += num_new_tokens
        live = self._requests.get(request_id)
        if live is None:
            return
        if live.num_tokens:
            gap = now - live.last_s
            itl = self.itl
            itl.counts[bisect_left(TOKEN_TIME_BUCKETS, gap)] += 1
            itl.total += gap
        else:
            live.first_s = now
            self.ttft.observe(now - live.received_s)
        live.num_tokens += num_new_tokens
        live.last_s = now

    def finished(self, request_id: str, record: RequestRecord | None, finish_reason: str, now: float) -> None:
        """A request ended, with the engine's record where the engine lived to send one."""
        self.success[finish_reason] = self.success.get(finish_reason, 0) + 1
        live = self._requests.pop(request_id, None)
        if live is None:
            return
        self.e2e.observe(now - live.received_s)
        self.prompt_tokens.observe(live.num_prompt_tokens)
        self.output_tokens.observe(live.num_tokens)
        if live.max_tokens:
            self.params_max_tokens.observe(live.max_tokens)
        if live.first_s is not None:
            decode_s = live.last_s - live.first_s
            self.decode.observe(decode_s)
            # The first token belongs to the prompt's time; 0 for a single token, as in vLLM.
            self.tpot.observe(decode_s / (live.num_tokens - 1) if live.num_tokens > 1 else 0.0)
        if record is None or record.admitted_s is None:
            return
        self.queue.observe(max(0.0, record.admitted_s - record.arrival_s))
        self.computed_tokens.observe(record.prompt_tokens - record.cached_tokens)
        if live.first_s is not None:
            self.prefill.observe(max(0.0, live.first_s - record.admitted_s))
            self.inference.observe(max(0.0, live.last_s - record.admitted_s))

    def rejected(self, reason: str, now: float) -> None:
        """A request was turned away before it reached the engine."""
        reason = REJECTIONS.get(reason, reason)
        self.rejections[reason] = self.rejections.get(reason, 0) + 1

    def message(self, message: FromEngine, now: float) -> None:
        """Anything the engine says; Report and Ready are of interest here."""
        if type(message) is Report:
            self._take(message)
        elif type(message) is Ready:
            self.ready = message
            bounds = one_two_five(message.max_model_len)
            if self.prompt_tokens.bounds != bounds and not any(self.prompt_tokens.counts):
                self._size_by_tokens(bounds)

    def _take(self, report: Report) -> None:
        self.report = report
        for num_tokens in report.iteration_tokens:
            self.iteration_tokens.observe(num_tokens)
        for name, value in (
            ("prompt_tokens", report.prompt_tokens_total),
            ("prompt_tokens_cached", report.prompt_tokens_cached_total),
            ("num_preemptions", report.num_preemptions_total),
            ("prefix_cache_queries", report.prefix_queries_total),
            ("prefix_cache_hits", report.prefix_hits_total),
            ("handed_over", report.handoffs.num_received),
            ("handoffs_failed", report.handoffs.num_failed),
            ("handoffs_local", report.handoffs.num_local),
            ("handoff_bytes", report.handoffs.num_bytes),
        ):
            # An engine that was started anew counts from 0 again; a Prometheus counter may never fall.
            before = self._reported.get(name, 0)
            self.engine_totals[name] = self.engine_totals.get(name, 0) + (value - before if value >= before else value)
            self._reported[name] = value

    # ---- output ----

    def render(self) -> tuple[bytes, str]:
        """The whole text for a scrape, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def describe(self) -> Iterable[Metric]:
        """Nothing: it keeps prometheus-client from collecting at registration to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All families, as prometheus-client wants them."""
        yield from self._gauges()
        yield from self._counters()
        for name, text, histogram in self._histograms():
            family = HistogramMetricFamily(f"{self.prefix}:{name}", text, labels=tuple(self.labels))
            family.add_metric(tuple(self.labels.values()), histogram.cumulative(), histogram.total)
            yield family

    def _gauge(self, name: str, text: str, values: Iterable[tuple[dict[str, str], float]]) -> Metric:
        family = GaugeMetricFamily(f"{self.prefix}:{name}", text)
        for labels, value in values:
            family.add_sample(family.name, {**self.labels, **labels}, value)
        return family

    def _counter(self, name: str, text: str, values: Iterable[tuple[dict[str, str], float]]) -> Metric:
        family = CounterMetricFamily(f"{self.prefix}:{name}", text)
        for labels, value in values:
            family.add_sample(family.name + "_total", {**self.labels, **labels}, value)
        return family

    def _gauges(self) -> Iterable[Metric]:
        report, ready = self.report, self.ready
        if report is not None:
            kv = report.kv
            held = kv.used + kv.shared + kv.filling
            reasons = {"capacity": 0, "deferred": 0}
            for reason, number in report.waiting_by_reason.items():
                reasons["capacity" if reason in ROOM_REASONS else "deferred"] += number
            yield self._gauge(
                "num_requests_running", "Number of requests in model execution batches.", [({}, report.num_running)]
            )
            yield self._gauge(
                "num_requests_waiting", "Number of requests waiting to be processed.", [({}, report.num_waiting)]
            )
            yield self._gauge(
                "num_requests_waiting_by_reason",
                "Number of waiting requests: for lack of room (capacity), or of something they need (deferred).",
                [({"reason": reason}, number) for reason, number in reasons.items()],
            )
            yield self._gauge(
                "kv_cache_usage_perc",
                "KV-cache usage. 1 means 100 percent usage.",
                [({}, held / kv.num_blocks if kv.num_blocks else 0.0)],
            )
        if ready is not None:
            labels = {
                "block_size": str(ready.block_size),
                "cache_dtype": self.cache.kv_cache_dtype,
                "enable_prefix_caching": str(self.cache.enable_prefix_caching),
                "gpu_memory_utilization": str(self.cache.gpu_memory_utilization),
                "num_gpu_blocks": str(ready.num_blocks),
            }
            yield self._gauge("cache_config_info", "Information of the KV cache's configuration.", [(labels, 1)])

    def _counters(self) -> Iterable[Metric]:
        totals = self.engine_totals
        for name, text in (
            ("prompt_tokens", "Number of prefill tokens processed."),
            ("prompt_tokens_cached", "Number of prompt tokens that came from a cache."),
            ("num_preemptions", "Cumulative number of preemptions."),
            ("prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens."),
            ("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens."),
        ):
            yield self._counter(name, text, [({}, totals.get(name, 0))])
        cached = totals.get("prompt_tokens_cached", 0)
        by_source = (totals.get("prompt_tokens", 0) - cached, cached, 0)
        yield self._counter(
            "prompt_tokens_by_source",
            "Number of prompt tokens by where their keys and values came from.",
            [({"source": source}, number) for source, number in zip(SOURCES, by_source, strict=True)],
        )
        outcomes = {"handed_over": "handed_over", "failed": "handoffs_failed", "local": "handoffs_local"}
        yield self._counter(
            "pd_handoffs",
            "Prompts handed from prefill to decode engines; tries that failed; prompts computed where decoded.",
            [({"outcome": outcome}, totals.get(name, 0)) for outcome, name in outcomes.items()],
        )
        yield self._counter(
            "pd_handoff_bytes", "Bytes of KV sent for hand-offs.", [({}, totals.get("handoff_bytes", 0))]
        )
        yield self._counter(
            "generation_tokens", "Number of generation tokens processed.", [({}, self.generation_tokens)]
        )
        yield self._counter(
            "request_success",
            "Count of finished requests by reason.",
            [({"finished_reason": reason}, number) for reason, number in self.success.items()],
        )
        yield self._counter(
            "admission_rejections",
            "Number of requests refused at admission, by reason.",
            [({"reason": reason}, number) for reason, number in self.rejections.items()],
        )

    def _histograms(self) -> Iterable[tuple[str, str, Histogram]]:
        return (
            ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", self.ttft),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", self.itl),
            (
                "request_time_per_output_token_seconds",
                "Histogram of time per output token of a request in seconds, the first token left out.",
                self.tpot,
            ),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self.e2e),
            ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", self.queue),
            ("request_prefill_time_seconds", "Histogram of time spent in PREFILL phase for request.", self.prefill),
            ("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", self.decode),
            ("request_inference_time_seconds", "Histogram of time spent in RUNNING phase for request.", self.inference),
            ("request_prompt_tokens", "Number of prefill tokens processed, per request.", self.prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed, per request.", self.output_tokens),
            ("request_params_n", "Histogram of the n request parameter.", self.params_n),
            ("request_params_max_tokens", "Histogram of the max_tokens request parameter.", self.params_max_tokens),
            ("iteration_tokens_total", "Histogram of number of tokens per engine_step.", self.iteration_tokens),
            (
                "request_prefill_kv_computed_tokens",
                "Histogram of prompt tokens whose KV was computed, not taken from a cache, per request.",
                self.computed_tokens,
            ),
        )
