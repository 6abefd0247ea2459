"""Prometheus text: vLLM's names, buckets and meanings, from the messages that an engine sends."""

from __future__ import annotations

import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.config.schema import CacheOptions
from penstock.core.request import SamplingParams
from penstock.engine.messages import KVReport, Ready, Report, RequestRecord
from penstock.server.metrics import Histogram, Metrics, one_two_five

LABELS = {"model_name": "m", "engine": "0"}


def ready(max_model_len: int = 1000, num_blocks: int = 100) -> Ready:
    return Ready("m", max_model_len, 32, num_blocks, 8, "2-core CPU", [], [])


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "now_s": 0.0,
        "num_running": 3,
        "num_waiting": 6,
        "waiting_by_reason": {"capacity": 2, "budget": 1, "shared_block": 2, "grammar": 1},
        "kv": KVReport(32, 100, used=20, shared=5, filling=5, cached=30, free=40),
        "num_steps_total": 2,
        "step_seconds_total": 0.1,
        "prompt_tokens_total": 100,
        "prompt_tokens_cached_total": 64,
        "prompt_tokens_by_source": {"device": 64, "compute": 36},
        "generation_tokens_total": 7,
        "num_preemptions_total": 1,
        "prefix_queries_total": 100,
        "prefix_hits_total": 64,
        "iteration_tokens": [40, 3],
        "requests": [],
    }
    return Report(**{**values, **changes})


def record(**changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "request_id": "a",
        "state": "finished",
        "prompt_tokens": 40,
        "cached_tokens": 32,
        "generation_tokens": 3,
        "arrival_s": 10.0,
        "admitted_s": 10.5,
        "first_token_s": 11.0,
        "finish_s": 12.0,
        "finish_reason": "stop",
        "num_preemptions": 0,
        "queue_reason": "capacity",
        "spans": [],
        "miss": None,
        "block_size": 32,
    }
    return RequestRecord(**{**values, **changes})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("m", CacheOptions())


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, other labels) -> value of everything rendered; model_name and engine are checked and left out."""
    text, kind = metrics.render()
    assert kind.startswith("text/plain; version=0.0.4")
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("vllm:"):
                assert {name: labels.pop(name) for name in LABELS} == LABELS, sample.name
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"vllm:{name}", tuple(sorted(labels.items()))]


def run_one(metrics: Metrics, request_id: str = "a", params: SamplingParams | None = None) -> None:
    """A request with three tokens: arrives at 10, admitted at 10.5, tokens at 11, 11.04 and 12, ends at 12.1."""
    metrics.received(request_id, 40, params or SamplingParams(max_tokens=50), 10.0)
    for now in (11.0, 11.04, 12.0):
        metrics.emitted(request_id, 1, now)
    metrics.finished(request_id, record(request_id=request_id), "stop", 12.1)


def test_names_are_those_that_dashboards_ask_for(metrics: Metrics) -> None:
    metrics.message(ready(), 0.0)
    metrics.message(report(), 0.0)
    names = {name for name, _ in samples(metrics)}
    gauges = ["num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason"]
    gauges += ["kv_cache_usage_perc", "cache_config_info"]
    counters = ["prompt_tokens", "prompt_tokens_by_source", "prompt_tokens_cached", "generation_tokens"]
    counters += ["request_success", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits"]
    counters += ["admission_rejections", "prompt_tokens_cached_by_source"]
    histograms = ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"]
    histograms += [f"request_{x}_time_seconds" for x in ("queue", "prefill", "decode", "inference")]
    histograms += ["request_time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens"]
    histograms += ["request_params_n", "request_params_max_tokens", "iteration_tokens_total"]
    histograms += ["request_prefill_kv_computed_tokens"]
    wanted = {f"vllm:{name}" for name in gauges} | {f"vllm:{name}_total" for name in counters}
    wanted |= {f"vllm:{name}{end}" for name in histograms for end in ("_bucket", "_sum", "_count")}
    assert wanted <= names
    assert {name for name in names if name.startswith("vllm:")} == wanted
    assert "process_resident_memory_bytes" in names


def test_types_are_declared_as_prometheus_wants_them(metrics: Metrics) -> None:
    metrics.message(report(), 0.0)
    lines = metrics.render()[0].decode().splitlines()
    for line in (
        "# TYPE vllm:num_requests_running gauge",
        "# TYPE vllm:prompt_tokens_total counter",
        "# TYPE vllm:iteration_tokens_total histogram",
    ):
        assert line in lines


def test_bucket_boundaries(metrics: Metrics) -> None:
    metrics.message(ready(max_model_len=260), 0.0)
    found: dict[str, list[str]] = {}
    for name, labels in samples(metrics):
        if name.endswith("_bucket"):
            found.setdefault(name.removeprefix("vllm:").removesuffix("_bucket"), []).append(dict(labels)["le"])
    assert found["time_to_first_token_seconds"][:4] == ["0.001", "0.005", "0.01", "0.02"]
    assert found["time_to_first_token_seconds"][-3:] == ["640.0", "2560.0", "+Inf"]
    assert len(found["time_to_first_token_seconds"]) == 23
    for name in ("inter_token_latency_seconds", "request_time_per_output_token_seconds"):
        assert found[name][0] == "0.01" and found[name][-2:] == ["80.0", "+Inf"] and len(found[name]) == 20
    assert found["e2e_request_latency_seconds"][0] == "0.3" and found["e2e_request_latency_seconds"][-2] == "7680.0"
    assert found["request_params_n"] == ["1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"]
    assert found["iteration_tokens_total"][:3] == ["1.0", "8.0", "16.0"]
    sizes = ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "+Inf"]
    for name in ("prompt_tokens", "generation_tokens", "params_max_tokens", "prefill_kv_computed_tokens"):
        assert found[f"request_{name}"] == sizes


def test_one_two_five_ends_at_the_limit() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
    assert one_two_five(99) == (1, 2, 5, 10, 20, 50)


def test_histogram_counts_a_boundary_in_the_bucket_that_ends_there() -> None:
    histogram = Histogram((1.0, 2.0))
    for x in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(x)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.total == 7.5


def test_gauges_and_waiting_reasons(metrics: Metrics) -> None:
    metrics.message(report(), 0.0)
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 6
    assert value(metrics, "num_requests_waiting_by_reason", reason="capacity") == 3
    assert value(metrics, "num_requests_waiting_by_reason", reason="deferred") == 3
    assert value(metrics, "kv_cache_usage_perc") == pytest.approx(0.3)


def test_what_the_engine_has_not_said_is_absent(metrics: Metrics) -> None:
    names = {name for name, _ in samples(metrics)}
    assert "vllm:num_requests_running" not in names and "vllm:cache_config_info" not in names


def test_cache_config(metrics: Metrics) -> None:
    metrics.message(ready(), 0.0)
    (labels,) = [dict(labels) for name, labels in samples(metrics) if name == "vllm:cache_config_info"]
    assert labels["block_size"] == "32" and labels["num_gpu_blocks"] == "100"
    assert labels["enable_prefix_caching"] == "True"


def test_a_request_from_arrival_to_end(metrics: Metrics) -> None:
    run_one(metrics)
    found = samples(metrics)

    def mean(name: str) -> tuple[float, float]:
        return found[f"vllm:{name}_count", ()], pytest.approx(found[f"vllm:{name}_sum", ()])

    assert mean("time_to_first_token_seconds") == (1, 1.0)
    assert mean("inter_token_latency_seconds") == (2, 1.0)
    assert mean("request_time_per_output_token_seconds") == (1, 0.5)
    assert mean("e2e_request_latency_seconds") == (1, 2.1)
    assert mean("request_queue_time_seconds") == (1, 0.5)
    assert mean("request_prefill_time_seconds") == (1, 0.5)
    assert mean("request_decode_time_seconds") == (1, 1.0)
    assert mean("request_inference_time_seconds") == (1, 1.5)
    assert mean("request_prompt_tokens") == (1, 40)
    assert mean("request_generation_tokens") == (1, 3)
    assert mean("request_params_max_tokens") == (1, 50)
    assert mean("request_prefill_kv_computed_tokens") == (1, 8)
    assert mean("request_params_n") == (1, 1)
    assert found["vllm:generation_tokens_total", ()] == 3
    assert found["vllm:request_success_total", (("finished_reason", "stop"),)] == 1
    assert found["vllm:request_success_total", (("finished_reason", "length"),)] == 0
    assert found["vllm:inter_token_latency_seconds_bucket", (("le", "0.05"),)] == 1


def test_several_tokens_of_one_step_are_one_gap(metrics: Metrics) -> None:
    metrics.received("a", 4, SamplingParams(), 0.0)
    metrics.emitted("a", 3, 1.0)
    metrics.emitted("a", 4, 1.2)
    assert value(metrics, "inter_token_latency_seconds_count") == 1
    assert value(metrics, "generation_tokens_total") == 7


def test_samples_of_one_request_count_once_for_n(metrics: Metrics) -> None:
    for index in range(4):
        metrics.received(f"a.{index}", 4, SamplingParams(n=4), 0.0)
    assert value(metrics, "request_params_n_count") == 1
    assert value(metrics, "request_params_n_sum") == 4


def test_a_request_that_never_ran(metrics: Metrics) -> None:
    metrics.received("a", 4, SamplingParams(), 0.0)
    metrics.finished("a", record(admitted_s=None, first_token_s=None), "abort", 3.0)
    metrics.received("b", 4, SamplingParams(), 0.0)
    metrics.finished("b", None, "error", 3.0)
    found = samples(metrics)
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 2
    assert found["vllm:request_queue_time_seconds_count", ()] == 0
    assert found["vllm:request_decode_time_seconds_count", ()] == 0
    assert found["vllm:request_success_total", (("finished_reason", "abort"),)] == 1
    assert found["vllm:request_success_total", (("finished_reason", "error"),)] == 1


def test_counters_follow_the_engines_totals_and_never_fall(metrics: Metrics) -> None:
    metrics.message(report(), 0.0)
    totals = {
        "prompt_tokens_total": 150,
        "prompt_tokens_cached_total": 70,
        "prompt_tokens_by_source": {"device": 70, "compute": 80},
    }
    metrics.message(report(**totals, iteration_tokens=[5]), 0.3)
    assert value(metrics, "prompt_tokens_total") == 150
    totals = {
        "prompt_tokens_total": 10,
        "prompt_tokens_cached_total": 4,
        "prompt_tokens_by_source": {"device": 4, "compute": 6},
    }
    metrics.message(report(**totals), 0.6)  # an engine started anew
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total", ()] == 160
    assert found["vllm:prompt_tokens_cached_total", ()] == 74
    assert found["vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)] == 86
    assert found["vllm:prompt_tokens_by_source_total", (("source", "local_cache_hit"),)] == 74
    assert found["vllm:prompt_tokens_by_source_total", (("source", "external_kv_transfer"),)] == 0
    assert found["vllm:iteration_tokens_total_count", ()] == 5
    assert found["vllm:iteration_tokens_total_sum", ()] == 40 + 3 + 5 + 40 + 3


def test_rejections_have_vllms_reason(metrics: Metrics) -> None:
    assert value(metrics, "admission_rejections_total", reason="max_num_queued_reqs") == 0
    metrics.rejected("queue_full", 0.0)
    metrics.rejected("draining", 0.0)
    assert value(metrics, "admission_rejections_total", reason="max_num_queued_reqs") == 1
    assert value(metrics, "admission_rejections_total", reason="draining") == 1


def test_prefix_and_odd_model_names() -> None:
    metrics = Metrics('a "quoted"\nname', CacheOptions(), prefix="penstock", engine="3")
    metrics.message(report(), 0.0)
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        if family.name == "penstock:num_requests_running":
            assert family.samples[0].labels == {"model_name": 'a "quoted"\nname', "engine": "3"}
            return
    pytest.fail("no penstock: metrics")


def test_requests_leave_nothing_behind(metrics: Metrics) -> None:
    for number in range(50):
        run_one(metrics, f"r{number}")
    metrics.emitted("unknown", 1, 0.0)
    metrics.finished("unknown", None, "abort", 0.0)
    assert metrics._requests == {}


def test_a_token_costs_far_less_than_two_microseconds(metrics: Metrics) -> None:
    """Best of several rounds, so that a busy machine does not fail it; measured at 0.3 us on a 2-core server."""
    metrics.received("a", 4, SamplingParams(), 0.0)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for step in range(2000):
            metrics.emitted("a", 1, step * 0.02)
        best = min(best, (time.perf_counter() - start) / 2000)
    assert best < 1e-6
