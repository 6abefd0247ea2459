"""What do steps of penstock-tiny cost on this machine? The cost model of `core/cost.py` fitted to measured steps.

    .venv/bin/python benchmarks/fit_steps.py --out benchmarks/results/fit_steps.json

The real engine computes prompts of 4 to 8,500 tokens (the model is told that it has so many positions: what comes out
matters to nobody, and takes as long), drawn so that all lengths by their logarithm are as likely, 1 to 8 at once; half
of them begin as an earlier one did, so that steps begin at contexts of all lengths, and some are followed by a few
tokens of answer. Every step gives a sample: tokens, rows, attended pairs, context, and seconds as the rank measured
them, the median of five rounds. The five coefficients are fitted to every second call's steps; the error is told of the
others. One thread by default, as an engine has beside others. Busy machines stretch steps: run it on a quiet one.
`benchmarks/routing.py --cost` simulates engines with what is written here.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np

from penstock import LLM
from penstock.bench.flags import machine, write_json
from penstock.config.load import model_directory
from penstock.core.cost import StepShape, fit_steps
from penstock.core.plan import StepPlan, StepResult
from penstock.core.request import SamplingParams

LONGEST, SHORTEST = 8500, 4  # the Mooncake traces' longest prompt, divided by 16
MOST_AT_ONCE = 8
ANSWERS = (1, 1, 1, 4)  # tokens
STEP_TOKENS = 2048  # of the engine's steps at most
VOCAB = range(16, 8000)

Samples = list[tuple[StepShape, float]]


class Watched:
    """An executor whose steps are noted: what they were, what they took."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._shapes: dict[int, StepShape] = {}
        self.samples: Samples = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, plan: StepPlan) -> None:
        self._shapes[plan.step] = StepShape.of(plan)
        self._inner.submit(plan)

    def collect(self) -> StepResult:
        result: StepResult = self._inner.collect()
        self.samples.append((self._shapes.pop(result.step), result.seconds))
        return result


Call = tuple[list[dict[str, list[int]]], list[SamplingParams]]


def drawn(num_calls: int, seed: int) -> list[Call]:
    """What is asked: prompts and how many tokens each is answered with."""
    draw, past, calls = random.Random(seed), [[16]], []
    for _ in range(num_calls):
        prompts, params = [], []
        for _ in range(draw.randint(1, MOST_AT_ONCE)):
            length = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
            old = draw.choice(past) if draw.random() < 0.5 else []
            ids = old[: draw.randint(0, min(len(old), length - 1))]
            ids = ids + draw.choices(VOCAB, k=length - len(ids))
            prompts.append({"prompt_token_ids": ids})
            params.append(SamplingParams(max_tokens=draw.choice(ANSWERS), temperature=0.0, ignore_eos=True))
        past = [*past, *(prompt["prompt_token_ids"] for prompt in prompts)][-64:]
        calls.append((prompts, params))
    return calls


def longer_model(directory: str) -> Path:
    """A copy of penstock-tiny with room for the longest prompt and its answer."""
    path = Path(shutil.copytree(model_directory("penstock-tiny"), Path(directory) / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONGEST + max(ANSWERS)}))
    return path


def measure(calls: list[Call], num_threads: int, rounds: int, directory: str) -> list[Samples]:
    """The samples of each call: medians of the rounds, each of which begins with an empty cache, after one to warm up.

    A step that did not come out alike in every round, which timing can do, is left out.
    """
    llm = LLM(longer_model(directory), num_threads=num_threads, seed=0, max_num_batched_tokens=STEP_TOKENS)
    built = llm._built
    built.executor = built.engine.executor = watched = Watched(built.executor)
    found: list[list[Samples]] = [[] for _ in calls]
    for round_ in range(rounds + 1):
        llm.reset_prefix_cache()
        for samples, (prompts, params) in zip(found, calls, strict=True):
            watched.samples = []
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(len(o.outputs[0].token_ids) == p.max_tokens for o, p in zip(outputs, params, strict=True))
            if round_:
                samples.append(watched.samples)
    llm.close()
    return [
        [
            (alike[0][0], statistics.median(seconds for _, seconds in alike))
            for alike in zip(*rounds_of_call, strict=False)
            if all(shape == alike[0][0] for shape, _ in alike)
        ]
        for rounds_of_call in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the JSON document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        calls = measure(drawn(options.calls, options.seed), options.num_threads, options.rounds, directory)
    fitted = [sample for samples in calls[::2] for sample in samples]
    held_out = [sample for samples in calls[1::2] for sample in samples]
    coefficients = fit_steps([shape for shape, _ in fitted], [seconds for _, seconds in fitted])
    true = np.array([seconds for _, seconds in held_out])
    errors = np.array([coefficients.seconds(shape) for shape, _ in held_out]) / true - 1
    document = {
        "coefficients_s": asdict(coefficients),
        "step_tokens": STEP_TOKENS,
        "num_threads": options.num_threads,
        "num_fitted": len(fitted),
        "num_held_out": len(held_out),
        "error_median": round(float(np.median(np.abs(errors))), 4),
        "error_p90": round(float(np.percentile(np.abs(errors), 90)), 4),
        "error_of_sum": round(float((errors * true).sum() / true.sum()), 4),  # predicted seconds over true ones
        **machine(),
    }
    print(document)
    if options.out is not None:
        samples = [[*astuple(shape), round(seconds, 6)] for samples in calls for shape, seconds in samples]
        write_json(options.out, {**document, "samples": samples})


if __name__ == "__main__":
    main()
