"""Where does one decode step go: native kernels by operation, head and choice of tokens, and Python around them?

    .venv/bin/python benchmarks/step_profile.py --out benchmarks/results/step_profile.json

Drives the real engine, executor, runner and front end in this process, as `LLM.generate` does, in steady decoding at a
context of some 128 tokens and greedy sampling. Each layer of the loop is timed from outside, by wall clock; a part's
own time is what its inner parts leave. `python` is all that is no native kernel: scheduler, index arrays, the runner,
what surrounds native calls, outputs and their text. The front end's share runs in a process of its own in a server;
it is in `python` here and shown apart. Prints a table per case, Python's share last; --out writes JSON. Each case first
checks that every request gets one token per step. Busy machines stretch waits: run it on a quiet one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from real_shapes import TITLES, model_settings

from penstock.bench.flags import machine, write_json
from penstock.build.engine import build_engine
from penstock.build.start import Stages, begin
from penstock.config.complete import complete
from penstock.config.hardware import probe
from penstock.config.load import model_directory, resolve
from penstock.core.request import SamplingParams
from penstock.engine.client import FrontEnd
from penstock.engine.garbage import rare_collections
from penstock.engine.tokenizer import load_tokenizer
from penstock.engine.wire import local_pair

CONTEXT = 128
WARM_STEPS = 4
NATIVE = ("layers", "head and choice")  # the parts of the native call


class Timed:
    """Another object whose chosen methods are timed: native ones cannot be replaced in place."""

    def __init__(self, inner: Any, methods: dict[str, Callable[..., Any]]) -> None:
        self._inner, self._methods = inner, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._inner, name)


class Loop:
    """An engine, its rank and a front end, `batch` requests at once."""

    def __init__(self, settings: dict[str, Any], batch: int, num_steps: int) -> None:
        limits = {"max_num_seqs": batch, "max_model_len": CONTEXT + 2 * num_steps + 64, "enable_prefix_caching": False}
        resolved = complete(resolve({**settings, **limits}), probe())
        arena = begin(resolved)
        self.built = build_engine(resolved, lambda stage, done, total: None, Stages(time.monotonic()), arena)
        front_wire, self.engine_wire = local_pair()
        self.front_wire = front_wire
        assert resolved.config.model.tokenizer is not None
        tokenizer = load_tokenizer(model_directory(resolved.config.model.tokenizer))
        self.front = FrontEnd(front_wire.send, tokenizer, resolved.model.vocab_size)
        self.front.handle(self.built.ready, time.monotonic())
        self.seconds: dict[str, float] = defaultdict(float)  # of the current step, by part, without inner parts
        self._inside: list[float] = []  # of the parts that are running: seconds of their inner parts
        rng = np.random.default_rng(0)
        params = SamplingParams(max_tokens=2 * num_steps + 32, temperature=0.0, ignore_eos=True)
        for n in range(batch):
            ids = rng.integers(16, resolved.model.vocab_size, CONTEXT).tolist()
            self.front.submit(str(n), ids, params, time.monotonic())
        for message in self.engine_wire.receive():
            assert not self.built.engine.handle(message, time.monotonic())

    def turn(self) -> int:
        """One step; tokens that came out."""
        engine = self.built.engine
        out = engine.launch(time.monotonic())
        if engine.scheduler.num_submitted:
            out += engine.complete(self.built.executor.collect(), time.monotonic())
        for message in out:
            self.engine_wire.send(message)
        now = time.monotonic()
        return sum(
            len(got.token_ids) for message in self.front_wire.receive() for got in self.front.handle(message, now)
        )

    def prefill(self) -> None:
        """Until every request decodes."""
        while any(not request.num_output for request in self.built.engine.scheduler.requests.values()):
            self.turn()

    def watch(self) -> None:
        """Time the parts from now on."""
        runner = self.built.runner
        model: Any = runner.model
        program = model._program
        model._program = Timed(program, {"step": self._timed("layers", program.step)})
        for owner, method, part in (
            (self.built.engine, "launch", "scheduler: plan"),
            (self.built.engine, "complete", "scheduler: commit, output"),
            (self.built.executor, "collect", "runner"),
            (runner.table, "prepare", "index arrays"),
            (runner.sampler, "sample", "sampler"),
            (self.front, "handle", "front end: text"),
        ):
            setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, assigned=())
        def timed(*args: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            value = function(*args)
            seconds = time.perf_counter() - start
            self.seconds[part] += seconds - self._inside.pop()
            if self._inside:
                self._inside[-1] += seconds
            return value

        return timed


@rare_collections()
def profile(settings: dict[str, Any], batch: int, num_steps: int) -> dict[str, Any]:
    """Medians over steps in milliseconds: the whole, and each part's own time."""
    loop = Loop(settings, batch, num_steps)
    loop.prefill()
    for _ in range(WARM_STEPS):
        assert loop.turn() == batch, "a step of decoding gives every request a token"
    gc.collect()
    whole = []
    for _ in range(num_steps):
        start = time.perf_counter()
        loop.turn()
        whole.append(time.perf_counter() - start)
    loop.watch()
    model: Any = loop.built.runner.model
    steps: list[dict[str, float]] = []
    operations: dict[str, list[float]] = defaultdict(list)
    for _ in range(num_steps):
        loop.seconds.clear()
        model.clear_seconds()
        start = time.perf_counter()
        assert loop.turn() == batch
        found = operation_seconds(model)
        loop.seconds["head and choice"] = found.pop("head and choice")  # the native call tells its share
        loop.seconds["layers"] -= loop.seconds["head and choice"]
        steps.append({**loop.seconds, "whole": time.perf_counter() - start})
        for name, seconds in found.items():
            operations[name].append(seconds)
    loop.built.executor.close()
    parts = {name: 1e3 * statistics.median(step[name] for step in steps) for name in steps[0] if name != "whole"}
    total = sum(parts.values())
    python = total - sum(parts[name] for name in NATIVE)
    return {
        "step_ms_median": round(1e3 * statistics.median(whole), 4),
        "timed_step_ms_median": round(1e3 * statistics.median(step["whole"] for step in steps), 4),
        "parts_ms": {name: round(value, 4) for name, value in parts.items()},
        "operations_ms": {name: round(1e3 * statistics.median(each), 4) for name, each in operations.items()},
        "python_ms": round(python, 4),
        "python_share": round(python / total, 4),
        "python_share_without_front_end": round(
            (python - parts["front end: text"]) / (total - parts["front end: text"]), 4
        ),
    }


def operation_seconds(model: Any) -> dict[str, float]:
    """What a NativeModel tells of its operations since the last `clear_seconds`, over all layers."""
    found: dict[str, float] = defaultdict(float)
    for name, seconds in model.seconds():
        found[name] += seconds
    return found


def show(case: dict[str, Any]) -> None:
    total = sum(case["parts_ms"].values())
    print(f"\n{TITLES[case['model']]}, {case['format']}, batch {case['batch']}: {case['step_ms_median']:.3f} ms, "
          f"{1e3 * case['batch'] / case['step_ms_median']:,.0f} tokens/s")  # fmt: skip
    for name, value in sorted(case["parts_ms"].items(), key=lambda item: -item[1]):
        print(f"  {name:<28} {value:9.3f} ms {value / total:7.1%}")
        if name == "layers":
            for operation, inner in sorted(case["operations_ms"].items(), key=lambda item: -item[1]):
                print(f"    {operation:<26} {inner:9.3f} ms {inner / total:7.1%}")
    print(f"  Python in all                {case['python_ms']:9.3f} ms {case['python_share']:7.1%}   "
          f"(without the front end {case['python_share_without_front_end']:.1%})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="B,A", help="A: Qwen3-0.6B's shape, B: penstock-tiny [B,A]")
    parser.add_argument("--formats", default="bf16,w8a8")
    parser.add_argument("--batches", default="1,32,128")
    parser.add_argument("--steps", type=int, default=30, help="measured per case, twice")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as workdir:
        for model in args.models.split(","):
            settings = model_settings(model, Path(workdir))
            for name in args.formats.split(","):
                quantization = "none" if name == "bf16" else name
                for batch in map(int, args.batches.split(",")):
                    found = profile({**settings, "quantization": quantization}, batch, args.steps)
                    cases.append({"model": model, "format": name, "batch": batch, "context": CONTEXT, **found})
                    show(cases[-1])
    if args.out:
        write_json(args.out, {**machine(), "num_threads": probe().num_cores, "cases": cases})


if __name__ == "__main__":
    main()
