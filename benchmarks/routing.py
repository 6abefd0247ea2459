"""Which router is best? Every policy on the Mooncake traces, with the real engines' schedulers, on virtual time.

Eight prefill engines at `--loads`: 1 is what they could carry without any cache. Each has a device cache of 2,000
blocks of 512 tokens (least recently used first); the router's index hears of changes 100 ms late. With and without a
shared pool of 8 times all devices. Lengths are divided by `--scale`, each block by as much, which leaves every hit as
it is. Times of arrival, recorded in lumps, are spread towards the next lump at random: that, and the policies' own
draws, differ from seed to seed, and margins are 95 % (Student's t, paired).

With `--cost FILE` (of fit_steps.py) the engines are penstock-tiny's on the machine where that was measured, prompts are
the scaled ones, a block is loaded at the rate of host memory in `--tier-rates` (of kv_tiers.py), and arrivals are
stretched to make the load right. Without, a large model: a prompt costs 1 a token and 1/32,768 a token and token of
context before it, in units that make the load right, and a block is loaded 20 times faster than it is computed.

Two bounds: `floor` is every hit that an infinite cache would give, and no queue. `one_cache` has queues: each prompt
goes to the engine with the least work, and all share that cache, which takes no time to read. `gap` is how much of the
way from least_loaded without a pool to `one_cache` ours with the pool goes, in P95. Prints one JSON line per policy;
--out writes them all, with who is better than whom. `--resume` keeps what the file has.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
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
BLIND = "least_loaded"
CROSSING = 32_768  # tokens of context at which attention costs as much as the rest
RELOAD = 20  # times faster than computing
TINY_KV_BYTES = 6 * 2 * 2 * 64 * 2  # of a token: layers, keys and values, heads, their size, bytes
METRICS = ("reuse", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "ttft_mean_s", "imbalance", "goodput", "prediction_error")
POOLS = {False: "without_pool", True: "with_pool"}


@dataclass(frozen=True, slots=True)
class Scene:
    """What is replayed on what. Plain data: it goes to other processes."""

    path: str
    load: float
    engines: int
    scale: int
    requests: int | None
    cost: dict[str, Any] | None  # of fit_steps.py
    rate: tuple[float, float] | None  # seconds and bytes per second of a load from host memory


def large_model(requests: Sequence[TraceRequest], scene: Scene) -> FleetSettings:
    """Costs such that prompts without any hit would keep the engines busy for `load` of the trace's time."""
    base = StepCoefficients(step=0.01, token=1e-4, attended=1e-4 / CROSSING)
    factor = scene.load * scene.engines * requests[-1].arrival_s / alone_s(FittedCost(base), requests)
    costs = StepCoefficients(step=factor * base.step, token=factor * base.token, attended=factor * base.attended)
    plain = FleetSettings(FittedCost(costs))
    move = MoveCost(0.002, plain.block_bytes / (TRACE_BLOCK * costs.token / RELOAD))
    cost = FittedCost(costs, plain.step_tokens, None, {"remote": move, "peer": move})
    return FleetSettings(cost, scene.engines, tokens_per_token=scene.scale)


def measured_model(scene: Scene) -> FleetSettings:
    """penstock-tiny, whose every token stands for `scale` of the trace."""
    assert scene.cost is not None and scene.rate is not None
    one, n = StepCoefficients(**scene.cost["coefficients_s"]), scene.scale
    costs = StepCoefficients(one.step, one.token / n, one.row, one.attended / n**2, one.context / n)
    step_tokens = n * scene.cost["step_tokens"]
    move = MoveCost(*scene.rate)
    cost = FittedCost(costs, step_tokens, None, {"remote": move, "peer": move})
    block_bytes = TRACE_BLOCK // n * TINY_KV_BYTES
    return FleetSettings(
        cost, scene.engines, step_tokens=step_tokens, tokens_per_token=n, block_bytes=block_bytes
    )  # fmt: skip


def alone_s(cost: FittedCost, requests: Sequence[TraceRequest]) -> float:
    """Seconds to compute all prompts one after another, without any hit."""
    lengths = np.array([request.prompt_tokens for request in requests])
    return float(cost.prefill_seconds_each(lengths, np.zeros_like(lengths)).sum())


def staged(scene: Scene, seed: int) -> tuple[list[TraceRequest], FleetSettings]:
    """Requests and engines, which fit each other: by the costs of a large model, by the times of a measured one."""
    requests = read_mooncake(
        scene.path,
        tokens_per_token=scene.scale,
        max_requests=scene.requests,
        spread=random.Random(f"spread {seed}"),
    )
    if scene.cost is None:
        return requests, large_model(requests, scene)
    settings = measured_model(scene)
    stretch = alone_s(settings.cost, requests) / (scene.load * scene.engines * requests[-1].arrival_s)
    return [replace(request, arrival_s=stretch * request.arrival_s) for request in requests], settings


def run(job: tuple[Scene, str, int, bool]) -> dict[str, float]:
    """One replay."""
    scene, policy_name, seed, with_pool = job
    requests, settings = staged(scene, seed)
    if with_pool:
        settings = replace(settings, pool_blocks=8 * settings.num_engines * settings.num_blocks)
    hashes = [trace_hashes(request, settings.block_size) for request in requests]
    fleet = SimFleet(settings, prefill_policy(policy_name, settings.cost, seed, tiers=with_pool))
    return asdict(report(fleet, fleet.run(requests, hashes)))


def bounds(scene: Scene, seeds: int) -> dict[str, dict[str, float]]:
    """Reuse and TTFT of the two bounds: see the top of the file."""
    found: dict[str, list[dict[str, float]]] = {"floor": [], "one_cache": []}
    for seed in range(seeds):
        requests, settings = staged(scene, seed)
        seen: set[bytes] = set()
        hits = []
        for request in requests:
            hashes = trace_hashes(request, settings.block_size)
            hits.append(TRACE_BLOCK * next((n for n, h in enumerate(hashes) if h not in seen), len(hashes)))
            seen.update(hashes)
        lengths, prefix = np.array([request.prompt_tokens for request in requests]), np.array(hits)
        seconds = settings.cost.prefill_seconds_each(lengths - prefix, prefix)
        free_s, queued = [0.0] * settings.num_engines, []
        for request, own_s in zip(requests, seconds.tolist(), strict=True):
            end_s = max(heapq.heappop(free_s), request.arrival_s) + own_s
            heapq.heappush(free_s, end_s)
            queued.append(end_s - request.arrival_s)
        reuse = float(prefix.sum() / lengths.sum())
        for name, times in (("floor", seconds), ("one_cache", np.array(queued))):
            p50, p95, p99 = map(float, np.percentile(times, (50, 95, 99)))
            found[name].append(
                {"reuse": reuse, "ttft_p50_s": p50, "ttft_p95_s": p95, "ttft_p99_s": p99, "ttft_mean_s": times.mean()}
            )
    return {
        name: {metric: round(float(np.mean([each[metric] for each in runs])), 4) for metric in runs[0]}
        for name, runs in found.items()
    }


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


def verdicts(raw: dict[tuple[str, bool], list[dict[str, float]]]) -> dict[str, Any]:
    """Ours against each of the others: both with, both without the pool, and ours with it against theirs without."""
    return {
        f"{name}, {'with' if pool else 'without'} pool; ours {'with' if mine else 'without'}": {
            metric: against(raw[OURS, mine], raw[name, pool], metric)
            for metric in ("reuse", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "ttft_mean_s")
        }
        for name in dict.fromkeys(name for name, _ in raw)
        for pool, mine in ((False, False), (True, True), (False, True))
        if (name, pool) != (OURS, mine)
    }


def scenes(options: argparse.Namespace) -> Iterator[tuple[str, Scene]]:
    """One per trace and load."""
    cost = rate = None
    if options.cost is not None:
        cost = json.loads(options.cost.read_text())
        host = json.loads(options.tier_rates.read_text())["speed"]["host"]["read"]
        rate = host["latency_ms"] / 1e3, 1e9 * host["gb_s"]
    for trace in TRACES if options.trace == "both" else [options.trace]:
        for load in options.loads:
            path = str(options.traces / TRACES[trace])
            yield trace, Scene(path, load, options.engines, options.scale, options.requests, cost, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="directory with the Mooncake traces")
    parser.add_argument("--trace", choices=[*TRACES, "both"], default="both")
    parser.add_argument("--policies", nargs="+", choices=list(PREFILL_POLICIES), default=list(PREFILL_POLICIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6])
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--scale", type=int, help="by how much lengths are divided [16 with --cost, else 32]")
    parser.add_argument("--cost", type=Path, help="what fit_steps.py wrote: simulate engines that were measured")
    parser.add_argument("--tier-rates", type=Path, default=Path("benchmarks/results/kv_tiers.json"))
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has")
    options = parser.parse_args()
    options.scale = options.scale or (32 if options.cost is None else 16)
    untold = ("traces", "trace", "loads", "policies", "out", "resume", "jobs")  # the rest of the document tells some
    settings = {name: str(value) for name, value in vars(options).items() if name not in untold}
    document: dict[str, Any] = {**machine(), "settings": settings, "traces": {}}
    if options.resume and options.out.exists():
        document["traces"] = json.loads(options.out.read_text())["traces"]
    with ProcessPoolExecutor(options.jobs) as workers:
        for trace, scene in scenes(options):
            found = document["traces"].setdefault(trace, {}).setdefault(str(scene.load), {})
            has = found.get(POOLS[True], {})
            names = [name for name in options.policies if name not in has]
            if not names:
                continue
            if OURS in has:
                names.append(OURS)  # again: others are set against it seed by seed
            if not has:
                found |= bounds(scene, options.seeds)
                for name in ("floor", "one_cache"):
                    print(json.dumps({"trace": trace, "load": scene.load, "policy": name, **found[name]}), flush=True)
            raw: dict[tuple[str, bool], list[dict[str, float]]] = {}
            for pool, title in POOLS.items():
                jobs = [(scene, name, seed, pool) for name in names for seed in range(options.seeds)]
                results = list(workers.map(run, jobs))
                for n, name in enumerate(names):
                    raw[name, pool] = results[n * options.seeds : (n + 1) * options.seeds]
                    told = summary(raw[name, pool])
                    before = found.setdefault(title, {}).setdefault(name, told)
                    assert before == told, f"{options.out} has {name} otherwise: {before}, now {told}"
                    line = {"trace": trace, "load": scene.load, "pool": pool, "policy": name, **told}
                    print(json.dumps(line), flush=True)
            if OURS in names:
                found.setdefault("ours_against", {}).update(verdicts(raw))
                if BLIND in names:
                    ours, blind = (
                        found[POOLS[pool]][name]["ttft_p95_s"][0] for pool, name in ((True, OURS), (False, BLIND))
                    )
                    found["gap"] = round((blind - ours) / (blind - found["one_cache"]["ttft_p95_s"]), 4)
                    print(json.dumps({"trace": trace, "load": scene.load, "gap": found["gap"]}), flush=True)
            if options.out:
                write_json(options.out, document)


if __name__ == "__main__":
    main()
