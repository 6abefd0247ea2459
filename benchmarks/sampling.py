"""What does choosing tokens cost per step, beside sorting the vocabulary?

Batches of decode rows, and two kinds of scores: `peaked` (Zipf-like, entropy of about 2 nats, as a trained model's) and
`flat` (normal with deviation 2, the worst case of top_p). Methods, in turns:

    penstock     Sampler.sample in plain torch and numpy: from float32 scores to token ids, seeded noise included
    native       the same with the native sampler, on one thread (a step deals its rows to all threads, beside the head)
    full_sort    what sorting costs in plain torch: sort, cut top-k and top-p, softmax, min-p, exponential race, argmax
                 (greedy: torch.argmax; temperature: softmax and exponential race, no sort)
    every_token  temperature only: Philox noise drawn for the whole vocabulary, then argmax; shows what bounds save

Before a figure counts, penstock's tokens must be those of the sorting float64 reference with the same noise (of 32
rows), but for top_p cuts that rounding decides. One JSON line per batch, scores and mode: milliseconds of wall time
(median, and the least) and of all threads' CPU time, which says more on a busy machine. The last lines are the cost of
a call where arithmetic is little: 1 and 256 rows of a vocabulary of 128.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.core.plan import Admitted
from penstock.core.request import SamplingParams
from penstock.nn.kernels import philox
from penstock.nn.kernels.edits import RowParams
from penstock.nn.kernels.native import NativeScores, usable_kernels
from penstock.nn.kernels.sampling import DenseScores, choose_reference
from penstock.runner.sampler import Sampler

RESULT = Path(__file__).resolve().parent / "results" / "sampling.json"
BATCHES = ((32, 151936), (64, 8192), (256, 8192))
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k_50": {"top_k": 50},
    "top_p_0.9": {"top_p": 0.9},
    "all_filters": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
NUM_CHECKED = 32
FIRST_POSITION = 100


def peaked(num_rows: int, size: int, generator: torch.Generator) -> Tensor:
    ranks = torch.arange(1, size + 1).float()
    scores = -1.8 * ranks.log() + 0.5 * torch.randn(num_rows, size, generator=generator)
    return scores.gather(1, torch.rand(num_rows, size, generator=generator).argsort(1))


def flat(num_rows: int, size: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.randn(num_rows, size, generator=generator)


def sampler_of(num_rows: int, size: int, fields: dict[str, Any]) -> Sampler:
    sampler = Sampler(num_rows, size)
    for slot in range(num_rows):
        sampler.admit(slot, Admitted(str(slot), (1,) * FIRST_POSITION, 1, SamplingParams(**fields), seed=slot))
    return sampler


def full_sort(scores: Tensor, params: SamplingParams) -> Tensor:
    """Tokens [N] the way plain torch code draws them; noise from torch's generator."""
    if params.temperature == 0:
        return scores.argmax(1)
    if params.top_k <= 0 and params.top_p >= 1:
        chances = (scores / params.temperature).softmax(1)
        return chances.div_(torch.empty_like(chances).exponential_()).argmax(1)
    ordered, ids = (scores / params.temperature).sort(1, descending=True)
    if params.top_k > 0:
        ordered = ordered.masked_fill(ordered < ordered[:, params.top_k - 1 : params.top_k], -torch.inf)
    chances = ordered.softmax(1)
    chances = chances.masked_fill(chances.cumsum(1) - chances >= params.top_p, 0.0)
    chances = chances.masked_fill(chances < params.min_p * chances[:, :1], 0.0)
    return ids.gather(1, chances.div_(torch.empty_like(chances).exponential_()).argmax(1, keepdim=True)).squeeze(1)


def every_token(scores: Tensor, temperature: float) -> np.ndarray:
    """Tokens [N] with one draw for each token of the vocabulary, row by row so that the words stay in the cache."""
    best = scores.amax(1).numpy()
    token_ids = np.arange(scores.shape[1])
    chosen = np.empty(len(scores), np.int64)
    for row, line in enumerate(scores.numpy()):
        word, _ = philox.words(np.uint64(row), FIRST_POSITION, token_ids, philox.REST)
        noise = philox.gumbel_of(philox.exponential(word))
        chosen[row] = ((line - best[row]) / np.float32(temperature) + noise).argmax()
    return chosen


def check(scores: Tensor, tokens: np.ndarray, params: SamplingParams) -> None:
    """Raise unless the first rows' tokens are the reference's; one may differ where rounding decides a top_p cut."""
    num = min(NUM_CHECKED, len(scores))
    rows = RowParams(
        np.full(num, params.temperature, np.float32),
        np.full(num, params.top_k),
        np.full(num, params.top_p),
        np.full(num, params.min_p),
        np.arange(num, dtype=np.uint64),
        np.full(num, FIRST_POSITION),
    )
    unlike = int((choose_reference(scores[:num], rows).numpy() != tokens[:num]).sum())
    if unlike > (1 if params.top_p < 1 else 0):
        raise SystemExit(f"{unlike} of {num} tokens are not the reference's: {params}")


def timed(methods: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each method, called in turns; the first round does not count."""
    wall_s: dict[str, list[float]] = {name: [] for name in methods}
    cpu_s: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, method in methods.items():
            begin, cpu_begin = time.perf_counter(), time.process_time()
            method()
            if repeat:
                wall_s[name].append(time.perf_counter() - begin)
                cpu_s[name].append(time.process_time() - cpu_begin)
    return {
        name: {
            "wall_ms_median": round(1e3 * statistics.median(wall_s[name]), 3),
            "wall_ms_min": round(1e3 * min(wall_s[name]), 3),
            "cpu_ms_median": round(1e3 * statistics.median(cpu_s[name]), 3),
        }
        for name in methods
    }


@torch.inference_mode()
def run_case(scores: Tensor, fields: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    num_rows, size = scores.shape
    params = SamplingParams(**fields)
    sampler = sampler_of(num_rows, size, fields)
    slots, positions = np.arange(num_rows), np.full(num_rows, FIRST_POSITION)
    check(scores, sampler.sample(DenseScores(scores), slots, positions).token_ids, params)
    methods: dict[str, Callable[[], object]] = {
        "penstock": lambda: sampler.sample(DenseScores(scores), slots, positions),
        "full_sort": lambda: full_sort(scores, params),
    }
    if usable_kernels():
        native = NativeScores(scores, usable_kernels()[0])
        check(scores, sampler.sample(native, slots, positions).token_ids, params)
        methods["native"] = lambda: sampler.sample(native, slots, positions)
    if params.temperature > 0 and params.top_k <= 0 and params.top_p >= 1:
        methods["every_token"] = lambda: every_token(scores, params.temperature)
    return timed(methods, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, for every method")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    lines: list[dict[str, Any]] = []

    def report(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)

    for num_rows, size in BATCHES:
        for kind, make in (("peaked", peaked), ("flat", flat)):
            scores = make(num_rows, size, generator)
            entropy = float(torch.distributions.Categorical(logits=scores).entropy().mean())
            case = {"num_rows": num_rows, "vocab_size": size, "scores": kind, "entropy_nats": round(entropy, 2)}
            for mode, fields in MODES.items():
                report({**case, "mode": mode, **run_case(scores, fields, args.repeats)})
    for mode in ("greedy", "temperature"):
        for num_rows in (1, 256):
            found = run_case(flat(num_rows, 128, generator), MODES[mode], 200)["penstock"]
            report({"num_rows": num_rows, "vocab_size": 128, "scores": "flat", "mode": mode, "penstock": found})
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch_threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**facts, "cases": lines}, indent=1) + "\n")


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
