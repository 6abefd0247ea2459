"""How fast is each set of CPU kernels here, beside plain torch, on the same work in the same minutes?

Every engine lives in this process at once (small models; --kernels and --works choose); rounds are interleaved, medians
count. Fresh random prompts in every round, the same for all; greedy, end tokens ignored. --check compares tokens first:
all native kernels of one kind are compared with themselves batched and alone (bit for bit), with torch as a share of
equal answers. Prints a table, --out writes JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penstock import LLM, SamplingParams
from penstock.bench.flags import machine, write_json
from penstock.nn.kernels.native import usable_kernels


@dataclass(frozen=True)
class Work:
    name: str
    num_requests: int
    num_input: int
    num_output: int


WORKS = (
    Work("one stream, 128 in / 64 out", 1, 128, 64),
    Work("first token of 128", 1, 128, 1),
    Work("first token of 1024", 1, 1024, 1),
    Work("32 x 128 in / 64 out", 32, 128, 64),
    Work("256 x 64 in / 32 out", 256, 64, 32),
    Work("32 x 1024 in / 32 out", 32, 1024, 32),
)


def run(llm: LLM, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin, [output.outputs[0].token_ids for output in outputs]


def prompts_of(work: Work, number: int, vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng((number, work.num_input, work.num_requests))
    return random.integers(16, vocab_size, (work.num_requests, work.num_input)).tolist()


def check(engines: dict[str, LLM]) -> dict[str, Any]:
    """Native answers are the same batched and alone; how many answers are torch's."""
    prompts = prompts_of(Work("", 16, 64, 0), 999, 8000)
    answers = {name: run(llm, prompts, 24)[1] for name, llm in engines.items()}
    found = {}
    for name, llm in engines.items():
        if name.startswith("torch"):
            continue
        alone = [run(llm, [prompt], 24)[1][0] for prompt in prompts]
        assert alone == answers[name], f"{name}: tokens depend on the batch"
        if "torch" in answers:
            found[name] = sum(a == b for a, b in zip(answers[name], answers["torch"], strict=True))
    return {"answers": len(prompts), "equal_to_torch": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="penstock-tiny")
    parser.add_argument("--dummy", action="store_true", help="random weights; the tokenizer is penstock-tiny's")
    parser.add_argument("--kernels", nargs="+", default=["torch", *usable_kernels()], help="NAME or NAME:QUANTIZATION")
    parser.add_argument("--works", type=int, nargs="+", default=list(range(len(WORKS))))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dummy = {"load_format": "dummy", "tokenizer": "penstock-tiny"} if args.dummy else {}
    engines = {}
    for each in args.kernels:
        kernels, _, quantization = each.partition(":")
        engines[each] = LLM(
            args.model, dtype="bfloat16", cpu_kernels=kernels, quantization=quantization or "none", max_model_len=2048,
            kv_cache_memory_bytes="1G", num_threads=args.threads, enable_prefix_caching=False, **dummy,
        )  # fmt: skip
        run(engines[each], prompts_of(WORKS[0], 0, 8000), 4)
    facts: dict[str, Any] = {**machine(), "model": args.model, "threads": args.threads, "rounds": args.rounds}
    if args.check:
        facts["tokens"] = check(engines)
        print(facts["tokens"])
    lines = []
    for work in (WORKS[n] for n in args.works):
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(args.rounds):
            prompts = prompts_of(work, number, 8000)
            for name, llm in engines.items():
                seconds[name].append(run(llm, prompts, work.num_output)[0])
        print(work.name, flush=True)
        base = statistics.median(seconds.get("torch", next(iter(seconds.values()))))
        for name, each in seconds.items():
            median = statistics.median(each)
            line = {
                "work": work.name,
                "kernels": name,
                "median_s": round(median, 4),
                "output_tokens_per_s": round(work.num_requests * work.num_output / median, 1),
                "over_first": round(base / median, 2),
                "seconds": [round(s, 4) for s in each],
            }
            lines.append(line)
            print(f"  {name:<18} {median:8.3f} s  {line['output_tokens_per_s']:9.1f} tok/s  {line['over_first']:5.2f}x")
    if args.out:
        write_json(args.out, {**facts, "lines": lines})
    for llm in engines.values():
        llm.close()


if __name__ == "__main__":
    main()
