"""What does routing do to real engines? Every policy before real processes, on the beginning of a Mooncake trace.

    .venv/bin/python benchmarks/live_routing.py --traces DIR [--engines 4] [--requests 250] [--policies ...]

Each policy gets `penstock serve -dp N` anew: N processes of penstock-tiny with small KV caches behind one router, over
HTTP. Lengths are divided by 16, so that a block of the trace is one of the engines; token ids are made from the
trace's block ids. Requests are sent as fast as `--concurrency` allows, in the trace's order: a machine with two cores
says nothing about waiting times with so many processes, so reuse (prompt tokens from caches, of those sent) and
imbalance (most prompt tokens computed by one engine, over the mean) are what is told. Answers are one token long, so
every engine's work is prompts. Two bounds stand beside the reuse: of one cache that keeps everything, and of one cache
(least recently used) with as many blocks as all engines have together. Prints a JSON line per policy; --out writes
them all.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from penstock.bench.flags import machine, write_json
from penstock.bench.server_process import running_server
from penstock.config.values import parse_size
from penstock.core.prefix import extend_chain
from penstock.core.route_policies import PREFILL_POLICIES
from penstock.sim.trace import TraceRequest, read_mooncake

TRACES = {
    "conversation": "mooncake_conversation_0-30min.jsonl.gz",
    "synthetic": "mooncake_synthetic_0-8min.jsonl.gz",
}
SCALE = 16
VOCAB_SIZE = 8000
MAX_PROMPT = 2000  # tokens of penstock-tiny
BLOCK = 32  # tokens
KV_BYTES = 6 * 2 * 2 * 64 * 2  # of a token: layers, keys and values, heads, their size, bytes
OURS = "least_time"


def requests_of(path: Path, number: int) -> list[TraceRequest]:
    """The first requests of a trace, scaled, cut to what the model takes."""
    return read_mooncake(path, tokens_per_token=SCALE, vocab_size=VOCAB_SIZE, max_requests=number)


def ask(url: str, request: TraceRequest) -> tuple[int, int]:
    """(prompt tokens, of these cached)."""
    prompt = [16 + token % (VOCAB_SIZE - 16) for token in request.token_ids[:MAX_PROMPT]]
    body = {"model": "penstock-tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    http = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(http, timeout=120) as response:
        usage = json.load(response)["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def measure(policy: str, requests: list[TraceRequest], args: argparse.Namespace) -> dict[str, Any]:
    """One server, one replay."""
    serve = ["penstock-tiny", "-dp", str(args.engines), "--route-policy", policy, "--num-threads", "1",
             "--kv-cache-memory-bytes", args.kv, "--disable-log-stats"]  # fmt: skip
    if args.pool:
        serve += ["--kv-offloading-size", args.pool]
    computed: Counter[str] = Counter()
    with running_server(serve) as server, ThreadPoolExecutor(args.concurrency) as threads:
        answers = list(threads.map(lambda request: ask(server.url, request), requests))
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
            for line in response.read().decode().splitlines():
                if line.startswith("vllm:prompt_tokens_by_source_total") and 'source="local_compute"' in line:
                    computed[line.split('engine="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    prompt, cached = (sum(column) for column in zip(*answers, strict=True))
    most, mean = max(computed.values(), default=0), sum(computed.values()) / args.engines
    return {
        "policy": policy,
        "requests": len(requests),
        "prompt_tokens": prompt,
        "reuse": round(cached / prompt, 4),
        "imbalance": round(most / mean, 3) if mean else None,
        "computed_by_engine": dict(computed),
    }


def blocks_of(memory: str) -> int:
    """Of penstock-tiny's KV in so many bytes."""
    return parse_size(memory) // (BLOCK * KV_BYTES)


def one_cache(requests: list[TraceRequest], num_blocks: int | None) -> float:
    """Share of prompt tokens that one cache would serve, each prompt being in it before the next one comes."""
    held: OrderedDict[bytes, None] = OrderedDict()
    most = total = 0
    for request in requests:
        ids = request.token_ids[:MAX_PROMPT]
        chain: list[bytes] = []
        extend_chain(chain, b"", ids, BLOCK)
        hits = chain[: (len(ids) - 1) // BLOCK]  # one token is always computed
        most += BLOCK * next((n for n, hash_ in enumerate(hits) if hash_ not in held), len(hits))
        total += len(ids)
        for hash_ in reversed(chain):
            held[hash_] = None
            held.move_to_end(hash_)
        while num_blocks is not None and len(held) > num_blocks:
            held.popitem(last=False)
    return round(most / total, 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="directory of the trace files")
    parser.add_argument("--names", nargs="+", default=list(TRACES), choices=list(TRACES), metavar="TRACE")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--kv", default="64M", help="KV cache of each engine [64M]")
    parser.add_argument("--pool", default="", help="host memory that all share, e.g. 96M; none by default")
    parser.add_argument("--policies", nargs="+", default=list(PREFILL_POLICIES), choices=list(PREFILL_POLICIES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for name in args.names:
        requests = requests_of(args.traces / TRACES[name], args.requests)
        num_blocks = args.engines * blocks_of(args.kv)
        bounds = {"bound": one_cache(requests, None), "bound_lru": one_cache(requests, num_blocks)}
        print(json.dumps({"trace": name, **bounds}), flush=True)
        for policy in args.policies:
            result = {"trace": name, **bounds, **measure(policy, requests, args)}
            results.append(result)
            print(json.dumps(result), flush=True)
    if args.out is not None:
        facts = {"engines": args.engines, "kv": args.kv, "pool": args.pool, "concurrency": args.concurrency}
        write_json(args.out, {"results": results, **facts, "command": "benchmarks/live_routing.py", **machine()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
