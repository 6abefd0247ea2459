"""How long does a routing decision take with 1,000 engines and 10 million blocks, and what does a block cost in memory?

Fills the real index through its event stream: engines hold chains of 64 blocks, drawn so that most chains lie on one
engine, many on a few, and one system prompt's on all of them. Then decides for prompts of 1 to 250 blocks, three of
four of which begin with what is held, and times the decision (`pick`), what it leaves behind (counters, promised
blocks), and the batch of events that follows it. Before it times anything it checks a sample of matches against what
was put in. Times are CPU time of the thread in microseconds, equal to wall time on an idle machine. --out writes the
JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import numpy as np

from penstock.bench.flags import machine, write_json
from penstock.core.cost import FittedCost, MoveCost, StepCoefficients
from penstock.core.kv_events import KVChange, KVEvents
from penstock.core.kv_index import KVIndex
from penstock.core.route_policies import prefill_policy
from penstock.core.routing import EngineViews, RouteRequest

CHAIN = 64
SYSTEM = 16  # blocks of the prompt that everybody begins with
COST = FittedCost(
    StepCoefficients(step=5e-3, token=5e-5, attended=1e-9),
    moves={"peer": MoveCost(1e-3, 2e10), "host": MoveCost(1e-3, 2e10)},
)


def chain(number: int, length: int = CHAIN) -> list[bytes]:
    """Hashes of a chain: evenly spread, as digests are."""
    raw = np.random.default_rng(number).bytes(16 * length)
    return [raw[16 * n : 16 * n + 16] for n in range(length)]


def fill(
    views: EngineViews, num_engines: int, num_blocks: int, draw: random.Random
) -> tuple[dict[int, list[str]], dict[str, int]]:
    """Which engines hold which chain, and the number of each engine's last batch. Told in batches, as engines would."""
    index, holders, seqs = views.index, {}, dict.fromkeys(range(num_engines), 0)

    def tell(engine: int, hashes: list[bytes]) -> None:
        events = KVEvents(f"e{engine}", 0, seqs[engine], (KVChange(True, "device", tuple(hashes)),))
        assert index.apply(events, 0.0) is None
        seqs[engine] += 1

    for engine in range(num_engines):
        tell(engine, chain(0, SYSTEM))
    for number in range(1, num_blocks // CHAIN + 1):
        copies = 1 if draw.random() < 0.9 else draw.randint(2, 4)
        engines = draw.sample(range(num_engines), copies)
        hashes = chain(number)
        for engine in engines:
            tell(engine, hashes)
        holders[number] = [f"e{engine}" for engine in engines]
    return holders, {f"e{engine}": seq - 1 for engine, seq in seqs.items()}


def quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99))
    return {f"{name}_p50_us": round(1e6 * p50, 1), f"{name}_p99_us": round(1e6 * p99, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--decisions", type=int, default=3000)
    parser.add_argument("--policy", default="least_time")
    parser.add_argument("--out", help="file for the JSON document")
    options = parser.parse_args()
    draw = random.Random(1)
    views = EngineViews(KVIndex(options.blocks), 64, 64 * 131_072)
    for engine in range(options.engines):
        views.add(f"e{engine}", num_blocks=2 * options.blocks // options.engines)
    start = time.thread_time()
    holders, last_seqs = fill(views, options.engines, options.blocks, draw)
    fill_s = time.thread_time() - start
    index = views.index
    for number in draw.sample(sorted(holders), 200):
        total = index.match(chain(number)).total
        assert {views.names[row] for row in np.flatnonzero(total == CHAIN)} == set(holders[number])
        assert set(np.flatnonzero(total)) == {index.rows[name] for name in holders[number]}

    policy = prefill_policy(options.policy, COST, 1)
    picks, updates, applies = [], [], []
    seqs: dict[str, int] = {}
    for n in range(options.decisions):
        now = n * 1e-3
        length = draw.randint(1, 250)
        kept = min(length, draw.choice((0, SYSTEM, CHAIN, CHAIN)))
        head = chain(0 if kept == SYSTEM else draw.randint(1, len(holders)), kept)
        request = RouteRequest(f"r{n}", 64 * length + 1, head + chain(10**9 + n, length - kept), 100)
        start = time.thread_time()
        choice = policy.pick(request, views, index, now)
        picked = time.thread_time()
        assert choice is not None
        views.sent(request.id, choice, now)
        index.expect(choice.engine, request.hashes, now)
        updated = time.thread_time()
        seq = seqs[choice.engine] = seqs.get(choice.engine, last_seqs[choice.engine]) + 1
        index.apply(KVEvents(choice.engine, 0, seq, (KVChange(True, "device", tuple(request.hashes)),)), now)
        picks.append(picked - start)
        updates.append(updated - picked)
        applies.append(time.thread_time() - updated)
        if n >= 200:
            views.done(f"r{n - 200}", now)
    result = {
        **machine(),
        "engines": options.engines,
        "blocks": index.num_blocks,
        "policy": options.policy,
        **quantiles("decision", picks),
        **quantiles("update", updates),
        **quantiles("events", applies),
        "fill_us_per_block": round(1e6 * fill_s / index.num_blocks, 2),
        "index_bytes_per_block": round(index.num_bytes / index.num_blocks, 1),
    }
    print(json.dumps(result))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
