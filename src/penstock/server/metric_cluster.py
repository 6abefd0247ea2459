"""Metric families of what engines have beside their schedulers: hand-offs, links, tiers. Empty for an engine alone.

vLLM's names where vLLM has them (its NIXL and offloading connectors); `penstock:` names for the rest. Knows the counts
of engines and prometheus-client's families.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from penstock.core.scaling import Signals
from penstock.engine.messages import Report
from penstock.server.metric_counts import LINK_TOTALS, TIER_TOTALS, EngineCounts

OWN = "penstock"

Samples = list[tuple[dict[str, str], float]]


def cluster_families(engines: Sequence[EngineCounts], prefix: str) -> Iterator[Metric]:
    """All of them, of the engines that have something to say."""
    told = [(counts, counts.report) for counts in engines if counts.report is not None]
    if any(report.name for _, report in told):
        yield from _engines(told)
    if any(report.handoffs is not None for _, report in told):
        yield from _handoffs(told)
        yield from _links(engines, prefix)
    if any(report.tiers for _, report in told):
        yield from _tiers(told, prefix)


def scaling_families(signals: Signals | None, num_changes: int, labels: dict[str, str]) -> Iterator[Metric]:
    """What an autoscaler wants to know. `signals` of the last window, None before its end."""
    model = {"model_name": labels["model_name"]}
    yield _counter(f"{OWN}:role_changes", "Engines that have changed their role.", [(model, num_changes)])
    if signals is None:
        return
    needed = {"prefill": signals.need.prefill, "decode": signals.need.decode}
    each: Samples = [({**model, "role": role}, value) for role, value in needed.items()]
    yield _gauge(f"{OWN}:engines_needed", "Engines that the last window's load asks for, with fractions.", each)
    wanted: Samples = [({**model, "role": role}, value) for role, value in signals.scale.items()]
    yield _gauge(f"{OWN}:engines_wanted", "The same in whole engines, at least one: what to scale a role to.", wanted)
    soon: Samples = [(model, signals.need.slots_free_soon)]
    yield _gauge(f"{OWN}:decode_slots_free_soon", "Decode slots that are free by the end of the next window.", soon)


Told = Sequence[tuple[EngineCounts, Report]]


def _gauge(name: str, text: str, samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, text)
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family


def _counter(name: str, text: str, samples: Samples) -> Metric:
    family = CounterMetricFamily(name, text)
    for labels, value in samples:
        family.add_sample(family.name + "_total", labels, value)
    return family


def _engines(told: Told) -> Iterable[Metric]:
    info = [({**c.labels, "engine_name": r.name, "role": r.role}, 1.0) for c, r in told]
    yield _gauge(f"{OWN}:engine_info", "Which engine has which number.", info)
    alive: Samples = [(c.labels, float(r.is_alive)) for c, r in told]
    yield _gauge(f"{OWN}:engine_up", "1 while the engine lives.", alive)
    computed = [(c.labels, c.total("prefill_tokens")) for c, _ in told]
    text = "Prompt tokens that steps computed, for other engines and again after preemption too."
    yield _counter(f"{OWN}:prefill_tokens", text, computed)


def _handoffs(told: Told) -> Iterable[Metric]:
    outcomes = ("sent", "received", "failed", "local")
    prompts: Samples = [({**c.labels, "outcome": n}, c.total("handoffs", n)) for c, _ in told for n in outcomes]
    text = (
        "Prompts computed for other engines (sent) or by them (received), tries that failed, and prompts that others "
        "might have computed (local)."
    )
    yield _counter(f"{OWN}:handoff_prompts", text, prompts)
    for name, text in (
        ("tokens_received", "Prompt tokens whose keys and values other engines sent."),
        ("tokens_received_cached", "Of these: the sender had them in its cache."),
    ):
        values = [(c.labels, c.total("handoffs", name)) for c, _ in told]
        yield _counter(f"{OWN}:handoff_{name}", text, values)
    moving: Samples = []
    for counts, report in told:
        if report.handoffs is not None:
            moving.append(({**counts.labels, "direction": "sending"}, report.handoffs.num_sending))
            moving.append(({**counts.labels, "direction": "receiving"}, report.handoffs.num_receiving))
    yield _gauge(f"{OWN}:handoff_prompts_in_flight", "Prompts that are being handed over.", moving)


def _links(engines: Sequence[EngineCounts], prefix: str) -> Iterable[Metric]:
    texts = (
        "Bytes of keys and values sent to a peer.",
        "Messages that carried them.",
        "Transfers that ended well; a prompt computed in several steps is several.",
        "Transfers that failed.",
        "Seconds of writing, summed over transfers.",
        "Seconds of them that no step hid.",
    )
    for name, text in zip(LINK_TOTALS, texts, strict=True):
        values: Samples = []
        for counts in engines:
            for key, value in counts.totals.items():
                if key[:2] == ("link", name):
                    values.append(({**counts.labels, "peer": key[2], "scheme": key[3]}, value))
        yield _counter(f"{OWN}:kv_transfer_{name}", text, values)

    def summed(counts: EngineCounts, name: str) -> float:
        return sum(value for key, value in counts.totals.items() if key[:2] == ("link", name))

    # Sums and counts only: links do not tell single transfers. Rates of sum over count work.
    for name, total, text in (
        ("nixl_xfer_time_seconds", "busy_seconds", "Transfer duration of KV cache transfers, over any link."),
        ("nixl_bytes_transferred", "bytes", "Bytes per KV cache transfer, over any link."),
    ):
        labels = tuple(engines[0].labels)
        family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=labels)
        for counts in engines:
            number = summed(counts, "transfers")
            family.add_metric(tuple(counts.labels.values()), [("+Inf", number)], summed(counts, total))
        yield family
    failed = [(counts.labels, summed(counts, "failed_transfers")) for counts in engines]
    yield _counter(f"{prefix}:nixl_num_failed_transfers", "Number of failed KV cache transfers, over any link.", failed)


def _tiers(told: Told, prefix: str) -> Iterable[Metric]:
    texts = (
        "Blocks of prompts that came from a tier.",
        "Bytes read from a tier.",
        "Bytes written to a tier.",
        "Seconds that loads from a tier took.",
    )
    for name, text in zip(TIER_TOTALS, texts, strict=True):
        values = [({**c.labels, "tier": t.name}, c.total("tier", name, t.name)) for c, r in told for t in r.tiers]
        yield _counter(f"{OWN}:tier_{name}", text, values)
    each = [({**c.labels, "tier": tier.name}, tier) for c, r in told for tier in r.tiers]
    capacity: Samples = [(labels, tier.capacity_blocks) for labels, tier in each]
    yield _gauge(f"{OWN}:tier_capacity_blocks", "Blocks that a tier may hold, 0 without a bound.", capacity)
    used: Samples = [(labels, tier.used_blocks) for labels, tier in each]
    yield _gauge(f"{OWN}:tier_used_blocks", "Blocks in a tier.", used)
    saved: Samples = [(labels, tier.saved_s) for labels, tier in each]
    yield _gauge(f"{OWN}:tier_saved_seconds", "Predicted time to compute what a tier gave, less its loads'.", saved)
    on: Samples = [(labels, float(tier.state == "on")) for labels, tier in each]
    yield _gauge(f"{OWN}:tier_on", "0 while a tier is off.", on)
    latency: Samples = [(labels, tier.latency_s) for labels, tier in each]
    yield _gauge(f"{OWN}:tier_latency_seconds", "Of a read from a tier onto the device, as measured so far.", latency)
    byte: Samples = [(labels, tier.byte_s) for labels, tier in each]
    yield _gauge(f"{OWN}:tier_byte_seconds", "The same per byte.", byte)
    for name, key, text in (
        ("load_bytes", "read_bytes", "Total bytes loaded from offload storage."),
        ("load_time", "load_seconds", "Total load time from offload storage, in seconds."),
        ("store_bytes", "written_bytes", "Total bytes stored to offload storage."),
    ):
        values = [(c.labels, c.total("tier", key, "host")) for c, _ in told]
        yield _counter(f"{prefix}:kv_offload_{name}", text, values)
