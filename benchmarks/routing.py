"""Which router is best? Every policy on the Mooncake traces, with the real engines' schedulers, on virtual time.

Eight prefill engines at 60 % of the load that they could carry without any cache, each with a device cache of 2,000
blocks of 512 tokens (least recently used first); the router's index hears of changes 100 ms late; a block is loaded 20
times faster than it is computed. With and without a shared pool of 8 times all devices. A prompt costs 1 a token and
1/32,768 a token and token of context before it, in units that make the load right; lengths are divided by 32, each
block by as much, which leaves every hit as it is. Times of arrival, recorded in lumps, are spread towards the next lump
at random: that, and the policies' own draws, differ from seed to seed, and margins are 95 % (Student's t, paired).

`floor` is no router: every hit that an infinite cache would give, and no queue. Prints one JSON line per policy; --out
writes them all, with who is better than whom.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from penstock.bench.flags import machine, write_json
from penstock.core.cost import FittedCost, MoveCost, StepCoefficients
from penstock.core.route_policies import PREFILL_POLICIES, prefill_policy
from penstock.sim.fleet import FleetSettings, SimFleet, trace_hashes
from penstock.sim.report import mean_and_margin, report
from penstock.sim.trace import TRACE_BLOCK, TraceRequest, read_mooncake

TRACES = {
    "conversation": "mooncake_conversation_0-30min.jsonl.gz",
    "synthetic": "mooncake_synthetic_0-8min.jsonl.gz",
}
OURS = "least_time"
CROSSING = 32_768  # tokens of context at which attention costs as much as the rest
RELOAD = 20  # times faster than computing
METRICS = ("reuse", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "ttft_mean_s", "imbalance", "goodput", "prediction_error")


def fleet_settings(
    requests: Sequence[TraceRequest], load: float, num_engines: int, with_pool: bool, tokens_per_token: int
) -> FleetSettings:
    """Costs such that prompts without any hit would keep the engines busy for `load` of the trace's time."""
    base = StepCoefficients(step=0.01, token=1e-4, attended=1e-4 / CROSSING)
    lengths = np.array([request.prompt_tokens for request in requests])
    alone_s = float(FittedCost(base).prefill_seconds_each(lengths, np.zeros_like(lengths)).sum())
    factor = load * num_engines * requests[-1].arrival_s / alone_s
    costs = StepCoefficients(step=factor * base.step, token=factor * base.token, attended=factor * base.attended)
    plain = FleetSettings(FittedCost(costs))
    move = MoveCost(0.002, plain.block_bytes / (TRACE_BLOCK * costs.token / RELOAD))
    cost = FittedCost(costs, plain.step_tokens, None, {"remote": move, "peer": move})
    pool_blocks = 8 * num_engines * plain.num_blocks if with_pool else 0
    return FleetSettings(cost, num_engines, pool_blocks=pool_blocks, tokens_per_token=tokens_per_token)


def read(path: str, seed: int, tokens_per_token: int, limit: int | None) -> list[TraceRequest]:
    return read_mooncake(
        path, tokens_per_token=tokens_per_token, max_requests=limit, spread=random.Random(f"spread {seed}")
    )


def run(job: tuple[str, str, int, bool, argparse.Namespace]) -> dict[str, float]:
    """One replay."""
    path, policy_name, seed, with_pool, options = job
    requests = read(path, seed, options.scale, options.requests)
    settings = fleet_settings(requests, options.load, options.engines, with_pool, options.scale)
    hashes = [trace_hashes(request, settings.block_size) for request in requests]
    fleet = SimFleet(settings, prefill_policy(policy_name, settings.cost, seed, tiers=with_pool))
    return asdict(report(fleet, fleet.run(requests, hashes)))


def floor(path: str, options: argparse.Namespace) -> dict[str, float]:
    """Reuse and TTFT that no router can pass while a prompt is computed by one engine."""
    requests = read(path, 0, options.scale, options.requests)
    settings = fleet_settings(requests, options.load, options.engines, True, options.scale)
    seen: set[bytes] = set()
    hits = []
    for request in requests:
        hashes = trace_hashes(request, settings.block_size)
        hits.append(TRACE_BLOCK * next((n for n, h in enumerate(hashes) if h not in seen), len(hashes)))
        seen.update(hashes)
    lengths, prefix = np.array([request.prompt_tokens for request in requests]), np.array(hits)
    seconds = settings.cost.prefill_seconds_each(lengths - prefix, prefix)
    p50, p95, p99 = map(float, np.percentile(seconds, (50, 95, 99)))
    reuse = float(prefix.sum() / lengths.sum())
    return {"reuse": reuse, "ttft_p50_s": p50, "ttft_p95_s": p95, "ttft_p99_s": p99}


def summary(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """{metric: [mean, margin]}"""
    return {name: [round(x, 4) for x in mean_and_margin([run[name] for run in runs])] for name in METRICS}


def against(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], metric: str) -> dict[str, Any]:
    """Relative change from theirs to ours, seed by seed, with its margin; who is better."""
    changes = [mine[metric] / max(other[metric], 1e-9) - 1 for mine, other in zip(ours, theirs, strict=True)]
    mean, margin = mean_and_margin(changes)
    sign = 1 if metric == "reuse" else -1
    verdict = "ours" if sign * mean > margin else "theirs" if sign * mean < -margin else "equal"
    return {"change": round(mean, 4), "margin": round(margin, 4), "better": verdict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", required=True, help="directory with the Mooncake traces")
    parser.add_argument("--trace", choices=[*TRACES, "both"], default="both")
    parser.add_argument("--policies", default=",".join(PREFILL_POLICIES), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--scale", type=int, default=32, help="by how much lengths are divided")
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", help="file for the JSON document")
    options = parser.parse_args()
    policies = options.policies.split(",")
    document: dict[str, Any] = {**machine(), "load": options.load, "seeds": options.seeds, "traces": {}}
    with ProcessPoolExecutor(options.jobs) as workers:
        for trace in TRACES if options.trace == "both" else [options.trace]:
            path = str(Path(options.traces) / TRACES[trace])
            found: dict[str, Any] = {"floor": floor(path, options)}
            print(json.dumps({"trace": trace, "policy": "floor", **found["floor"]}), flush=True)
            raw: dict[tuple[str, bool], list[dict[str, float]]] = {}
            for with_pool in (False, True):
                names = "with_pool" if with_pool else "without_pool"
                found[names] = {}
                jobs = [(path, name, seed, with_pool, options) for name in policies for seed in range(options.seeds)]
                results = list(workers.map(run, jobs))
                for n, name in enumerate(policies):
                    raw[name, with_pool] = results[n * options.seeds : (n + 1) * options.seeds]
                    found[names][name] = summary(raw[name, with_pool])
                    print(
                        json.dumps({"trace": trace, "pool": with_pool, "policy": name, **found[names][name]}),
                        flush=True,
                    )
            if OURS in policies:
                found["ours_against"] = {
                    f"{name}, {'with' if pool else 'without'} pool; ours {'with' if mine else 'without'}": {
                        metric: against(raw[OURS, mine], raw[name, pool], metric)
                        for metric in ("reuse", "ttft_p95_s", "ttft_mean_s")
                    }
                    for name in policies
                    for pool, mine in ((False, False), (True, True), (False, True))
                    if (name, pool) != (OURS, mine)
                }
            document["traces"][trace] = found
            if options.out:
                write_json(options.out, document)


if __name__ == "__main__":
    main()
