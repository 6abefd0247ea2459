"""What do KV tiers give a real engine? A multi-turn workload on one engine, with and without tiers below the device.

    .venv/bin/python benchmarks/live_tiers.py [--model penstock-tiny] [--users 60] [--turns 6]

Users take turns at random: each turn is the whole conversation so far and new tokens, and
asks for one token. The device holds 5 % of all blocks that come up, host memory 4 and disk 16 times as much as the
device. Every setting replays the same turns from the same seed, in an engine of its own, and must give the same tokens.
Seconds are of single requests, one after another: the time to the first token without waiting. Prints a JSON line per
setting; --out writes them all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from penstock import LLM, SamplingParams
from penstock.bench.flags import machine, write_json

ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def turns_of(users: int, turns: int, new_tokens: int, vocab: int, seed: int) -> list[tuple[int, list[int]]]:
    """(user, prompt) in the order in which they come."""
    draw = random.Random(seed)
    order = [user for user in range(users) for _ in range(turns)]
    draw.shuffle(order)
    texts: dict[int, list[int]] = {user: [] for user in range(users)}
    prompts = []
    for user in order:
        texts[user] = texts[user] + [draw.randrange(20, vocab) for _ in range(new_tokens)]
        prompts.append((user, texts[user]))
    return prompts


def replay(
    model: str, prompts: list[tuple[int, list[int]]], settings: dict[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """Figures of one setting, and the tokens."""
    seconds, tokens, by_source = [], [], {"device": 0, "host": 0, "disk": 0, "computed": 0}
    with LLM(model, **settings) as llm:
        llm.generate([{"prompt_token_ids": list(range(100, 400))}], ONE, use_tqdm=False)  # warms everything up
        engine = llm._built.engine
        for _, prompt in prompts:
            received = engine.scheduler.counters.prompt_tokens_received
            begin = time.perf_counter()
            (output,) = llm.generate([{"prompt_token_ids": prompt}], ONE, use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
            received = engine.scheduler.counters.prompt_tokens_received - received
            tokens += output.outputs[0].token_ids
            by_source["device"] += output.num_cached_tokens - received
            by_source["computed"] += len(prompt) - output.num_cached_tokens
        size = engine.scheduler.block_size
        if engine.tiers is not None:
            for tier, blocks in engine.tiers.client.hits.items():
                by_source[tier] = by_source.get(tier, 0) + blocks * size
    total = sum(len(prompt) for _, prompt in prompts)
    seconds.sort()
    return {
        "share_of_prompt_tokens": {name: round(number / total, 4) for name, number in by_source.items()},
        "ttft_mean_ms": round(1e3 * statistics.mean(seconds), 3),
        "ttft_p50_ms": round(1e3 * seconds[len(seconds) // 2], 3),
        "ttft_p95_ms": round(1e3 * seconds[int(0.95 * len(seconds))], 3),
        "seconds": round(sum(seconds), 3),
    }, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="penstock-tiny")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=250)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prompts = turns_of(args.users, args.turns, args.new_tokens, args.vocab, 1)
    num_blocks = args.users * (args.turns * args.new_tokens // 32)
    with LLM(args.model, load_format=args.load_format, max_model_len=2048, kv_cache_memory_bytes="64M") as llm:
        block_bytes = sum(group.block_bytes for group in llm._built.engine.scheduler.layout.groups)
    device = max(2 * 2048 // 32, num_blocks // 20)
    common = {"load_format": args.load_format, "max_model_len": 2048, "seed": 0}
    common |= {"kv_cache_memory_bytes": f"{(device + 1) * block_bytes}"}
    host = f"{int(4 * device * block_bytes * 1.02) + 65536}B"
    disk = f"{int(16 * device * block_bytes * 1.02) + (1 << 20)}B"
    runs: dict[str, list[dict[str, Any]]] = {"device": [], "device+host": [], "device+host+disk": []}
    expected: list[int] | None = None
    for _ in range(args.rounds):
        for name, found in runs.items():
            with tempfile.TemporaryDirectory() as directory:
                settings: dict[str, Any] = dict(common)
                if "host" in name:
                    settings["kv_offloading_size"] = host
                if "disk" in name:
                    settings |= {
                        "kv_disk_path": directory,
                        "kv_disk_size": disk,
                        "kv_lower_write_policy": "write_through",
                    }
                figures, tokens = replay(args.model, prompts, settings)
            assert expected is None or tokens == expected, f"{name} gives other tokens"
            expected = tokens
            found.append(figures)
            print(json.dumps({"tiers": name, **figures}), flush=True)
    results = {
        name: sorted(found, key=lambda figures: figures["ttft_mean_ms"])[len(found) // 2]
        for name, found in runs.items()
    }
    if args.out is not None:
        facts = {"users": args.users, "turns": args.turns, "new_tokens": args.new_tokens, "model": args.model}
        blocks = {"all": num_blocks, "device": device, "host": 4 * device, "disk": 16 * device}
        write_json(args.out, {"results": results, "rounds": args.rounds, "blocks": blocks, **facts,
                              "command": "benchmarks/live_tiers.py", **machine()})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
