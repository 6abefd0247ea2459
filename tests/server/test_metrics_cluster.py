"""Metrics of many engines: each has its number, prompts count once by source, and what moves has its own families."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from tests.server.synthetic_cluster import CLUSTER, cluster_report, decode_report, prefill_report
from tests.server.test_metrics import record

from penstock.cluster.merge import merged_report, without_gauges
from penstock.cluster.roles import RoleKeeper
from penstock.config.schema import CacheOptions
from penstock.core.cost import FittedCost, StepCoefficients
from penstock.core.request import SamplingParams
from penstock.core.scaling import Need, Signals
from penstock.server.metrics import Metrics

Found = dict[tuple[str, ...], float]


def cluster_metrics() -> Metrics:
    metrics = Metrics("m", CacheOptions(), engine_of=lambda request_id: "decode-0" if request_id else "")
    metrics.message(CLUSTER, 0.0)
    return metrics


def samples(metrics: Metrics) -> Found:
    """(name, engine, the other labels' values) -> value."""
    found: Found = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            engine = labels.pop("engine", "")
            labels.pop("model_name", None)
            key = (sample.name, engine, *(labels[name] for name in sorted(labels)))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def test_engines_have_numbers_in_the_order_of_the_cluster() -> None:
    metrics = cluster_metrics()
    metrics.message(cluster_report(1.0, 4), 1.0)
    found = samples(metrics)
    assert found["vllm:num_requests_running", "0"] == 2 and found["vllm:num_requests_running", "1"] == 3
    assert found["vllm:num_requests_waiting", "0"] == 1 and found["vllm:num_requests_waiting", "1"] == 0
    assert found["vllm:num_requests_waiting_by_reason", "0", "capacity"] == 1
    assert found["penstock:engine_info", "0", "prefill-0", "prefill"] == 1
    assert found["penstock:engine_info", "1", "decode-0", "decode"] == 1
    configs = [key for key in found if key[0] == "vllm:cache_config_info"]
    assert [key[1] for key in configs] == ["0", "1"]


def test_an_autoscaler_is_told_what_each_role_needs() -> None:
    roles = RoleKeeper(FittedCost(StepCoefficients(step=0.01, token=1e-4)))
    metrics = Metrics("m", CacheOptions(), roles=roles)
    found = samples(metrics)
    assert found["penstock:role_changes_total", ""] == 0
    assert not [key for key in found if key[0].startswith("penstock:engines")], "nothing was measured yet"
    roles.signals = Signals(Need(2.5, 0.25, 7.0), None, {"prefill": 3, "decode": 1}, "")
    roles.num_changes = 2
    found = samples(metrics)
    assert found["penstock:engines_needed", "", "prefill"] == 2.5
    assert found["penstock:engines_needed", "", "decode"] == 0.25
    assert found["penstock:engines_wanted", "", "prefill"] == 3 and found["penstock:engines_wanted", "", "decode"] == 1
    assert found["penstock:decode_slots_free_soon", ""] == 7
    assert found["penstock:role_changes_total", ""] == 2


def test_prompt_tokens_have_vllms_sources_and_count_once() -> None:
    metrics = cluster_metrics()
    metrics.message(cluster_report(1.0, 4), 1.0)
    found = samples(metrics)

    def by_source(engine: str) -> list[float]:
        names = ("local_compute", "local_cache_hit", "external_kv_transfer")
        return [found["vllm:prompt_tokens_by_source_total", engine, name] for name in names]

    assert by_source("0") == [0, 0, 0]
    assert by_source("1") == [64, 320, 4000 + 4 * 384]
    assert sum(by_source("1")) == found["vllm:prompt_tokens_total", "1"]
    assert found["vllm:prompt_tokens_cached_total", "1"] == 320 + 4000 + 4 * 384
    cached = {
        key[2]: value for key, value in found.items() if key[:2] == ("vllm:prompt_tokens_cached_by_source_total", "1")
    }
    assert cached == {"device": 320, "p2p": 4000, "host": 40 * 32, "disk": 8 * 32, "external_unspecified": 0}
    assert found["penstock:prefill_tokens_total", "0"] == 4000


def test_handoffs_links_and_tiers() -> None:
    metrics = cluster_metrics()
    metrics.message(cluster_report(1.0, 4), 1.0)
    found = samples(metrics)
    assert found["penstock:handoff_prompts_total", "0", "sent"] == 4
    assert found["penstock:handoff_prompts_total", "1", "received"] == 4
    assert found["penstock:handoff_prompts_total", "1", "failed"] == 1
    assert found["penstock:handoff_prompts_total", "1", "local"] == 4
    assert found["penstock:handoff_prompts_in_flight", "0", "sending"] == 2
    assert found["penstock:handoff_prompts_in_flight", "1", "receiving"] == 2
    assert found["penstock:handoff_tokens_received_cached_total", "1"] == 1000
    assert found["penstock:kv_transfer_bytes_total", "0", "decode-0", "shm"] == 4e6
    assert found["penstock:kv_transfer_exposed_seconds_total", "0", "decode-0", "shm"] == 0.008
    assert found["vllm:nixl_bytes_transferred_sum", "0"] == 4e6
    assert found["vllm:nixl_bytes_transferred_count", "0"] == found["vllm:nixl_xfer_time_seconds_count", "0"] == 4
    assert found["vllm:nixl_num_failed_transfers_total", "0"] == 1
    assert found["penstock:tier_hit_blocks_total", "1", "host"] == 40
    assert found["penstock:tier_used_blocks", "1", "disk"] == 1600
    assert (found["penstock:tier_on", "1", "host"], found["penstock:tier_on", "1", "disk"]) == (1, 0)
    assert found["vllm:kv_offload_load_bytes_total", "1"] == 5000
    assert found["vllm:kv_offload_store_bytes_total", "1"] == 7000


def test_requests_belong_to_the_engine_that_decodes_them() -> None:
    metrics = cluster_metrics()
    metrics.received("a", 40, SamplingParams(max_tokens=50), 10.0)
    metrics.emitted("a", 1, 11.0)
    metrics.emitted("a", 1, 12.0)
    metrics.finished("a", record(), "stop", 12.1)
    found = samples(metrics)
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert (found[f"vllm:{name}_count", "0"], found[f"vllm:{name}_count", "1"]) == (0, 1)
    assert found["vllm:generation_tokens_total", "1"] == 2
    assert found["vllm:request_success_total", "1", "stop"] == 1
    metrics.rejected("draining", 13.0)
    rejected = [key for key in samples(metrics) if key[0] == "vllm:admission_rejections_total" and key[2] == "draining"]
    assert [key[1] for key in rejected] == ["1"], "once, whatever the number of engines"


def test_a_step_counts_once_at_the_engine_that_reported_it() -> None:
    metrics = cluster_metrics()
    prefill, decode = prefill_report(1.0, 1), decode_report(1.0, 1)
    metrics.message(merged_report([prefill, decode], 1.0, prefill), 1.0)
    metrics.message(merged_report([prefill, decode], 1.1, decode), 1.1)
    metrics.message(merged_report([prefill, decode], 1.2, decode), 1.2)
    found = samples(metrics)
    assert found["vllm:iteration_tokens_total_sum", "0"] == 256
    assert found["vllm:iteration_tokens_total_sum", "1"] == 6


def test_counters_go_on_when_an_engine_starts_anew() -> None:
    metrics = cluster_metrics()
    metrics.message(cluster_report(1.0, 5), 1.0)
    decode = decode_report(2.0, 5)
    metrics.message(merged_report([decode], 2.0, None, [without_gauges(prefill_report(2.0, 5))]), 2.0)
    assert samples(metrics)["penstock:engine_up", "0"] == 0
    metrics.message(merged_report([prefill_report(3.0, 1), decode], 3.0), 3.0)
    found = samples(metrics)
    assert found["penstock:engine_up", "0"] == 1
    assert found["penstock:handoff_prompts_total", "0", "sent"] == 6
    assert found["penstock:kv_transfer_bytes_total", "0", "decode-0", "shm"] == 6e6
