"""What do long prompts do to those who are reading answers? One engine against 1P1D, on the same processors.

    .venv/bin/python benchmarks/pd_interference.py [--model DIR --load-format dummy] [--streams 4] [--prompts 6]

`--streams` answers are being streamed while prompts of `--prompt-tokens` arrive, `--gap` seconds apart. Told are the
gaps between tokens of the streams (median, 95th and 99th percentile, longest) and the prompts' time to the first token.
One engine has all processors; with 1P1D each engine has half of them. Settings take turns over `--rounds`, with new
prompts each time; medians of rounds. Prints JSON lines; --out writes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from penstock.bench.flags import machine, write_json
from penstock.bench.server_process import running_server

SETTINGS = {"one engine": (), "1P1D": ("--pd", "1P1D", "--pd-max-short-output", "0")}


def stream(url: str, model: str, prompt: list[int], max_tokens: int) -> Iterator[float]:
    """When each piece of a streamed answer came."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data: {"):
                yield time.perf_counter()


def measure(url: str, model: str, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One round."""
    draw = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(20, args.vocab) for _ in range(length)]

    times: list[list[float]] = [[] for _ in range(args.streams)]
    first = threading.Barrier(args.streams + 1)
    prompts = [prompt(64) for _ in range(args.streams)]
    longs = [prompt(args.prompt_tokens) for _ in range(args.prompts)]

    def read(n: int) -> None:
        for when_s in stream(url, model, prompts[n], args.output_tokens):
            times[n].append(when_s)
            if len(times[n]) == 4:
                first.wait()

    readers = [threading.Thread(target=read, args=(n,)) for n in range(args.streams)]
    for reader in readers:
        reader.start()
    first.wait()  # all streams run
    ttfts: list[float] = []

    def ask(n: int) -> None:
        begin = time.perf_counter()
        ttfts.append(next(stream(url, model, longs[n], 2)) - begin)

    askers = []
    for n in range(args.prompts):
        askers.append(threading.Thread(target=ask, args=(n,)))
        askers[-1].start()
        time.sleep(args.gap)
    for thread in (*askers, *readers):
        thread.join()
    gaps = sorted(b - a for each in times for a, b in itertools.pairwise(each[4:]))

    def at(share: float) -> float:
        return 1e3 * gaps[min(len(gaps) - 1, int(share * len(gaps)))]

    return {
        "itl_p50_ms": at(0.50), "itl_p95_ms": at(0.95), "itl_p99_ms": at(0.99), "itl_max_ms": 1e3 * gaps[-1],
        "ttft_p50_ms": 1e3 * statistics.median(ttfts), "ttft_max_ms": 1e3 * max(ttfts),
        "output_tokens_per_s": len(gaps) / (max(each[-1] for each in times) - min(each[4] for each in times)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="penstock-tiny")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--gap", type=float, default=0.2)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step [512]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for number in range(args.rounds):
        for name, flags in SETTINGS.items():
            serve = [
                args.model, "--load-format", args.load_format, "--kv-cache-memory-bytes", "512M", "--max-model-len",
                "2048", "--served-model-name", "m", "--disable-log-stats", "--generation-config", "vllm",
                "--max-num-batched-tokens", str(args.chunk), *flags,
            ]  # fmt: skip
            with running_server(serve) as server:
                measure(server.url, "m", args, 1000 + number)  # warms up
                rounds[name].append(measure(server.url, "m", args, number))
            print(json.dumps({"setting": name, **{k: round(v, 2) for k, v in rounds[name][-1].items()}}), flush=True)
    results = {
        name: {key: round(statistics.median(each[key] for each in found), 2) for key in found[0]}
        for name, found in rounds.items()
    }
    print(json.dumps(results))
    if args.out is not None:
        facts = {key: value for key, value in vars(args).items() if key != "out"} | {"model": Path(args.model).name}
        write_json(args.out, {"results": results, "settings": facts, "command": "benchmarks/pd_interference.py",
                              **machine()})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
