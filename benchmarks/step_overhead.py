"""What does a whole step cost besides the model: Python of engine, runner inputs and sampler, with nothing to compute?

Drives the real Engine, InlineExecutor, Runner, RequestTable and Sampler in steady decoding, as the live loop does. The
model is null: it gives canned scores over a vocabulary of 64, so that what is left is interpreter and array overhead,
not arithmetic. Attention is null too; what preparing the plain-torch one costs per step (index tensors and masks, the
share of a kernel) is measured apart and printed beside. Times are CPU time of the one thread that does it all, so that
a busy machine adds little: nothing in a step waits. Before a figure counts, every request must have got exactly the
tokens that its canned scores say. Prints one JSON line per case, times in microseconds per step, and the hottest
functions of a profile; --out writes the lines as JSON. `scheduler_loop.py` is the same for the engine alone.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import pstats
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.bench.flags import machine, write_json
from penstock.config.model import KVGroup, KVLayout
from penstock.core.policy import FcfsPolicy
from penstock.core.request import SamplingParams
from penstock.core.scheduler import Scheduler, SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import AddRequest, Tokens
from penstock.engine.ranks import InlineExecutor
from penstock.nn.doors import Batch, Spans
from penstock.nn.kernels.attention import PagedAttention
from penstock.runner.inputs import RequestTable
from penstock.runner.kv_store import KVStore
from penstock.runner.runner import Runner
from penstock.runner.sampler import Sampler

BLOCK_SIZE, VOCAB, HIDDEN = 32, 64, 1
WARM_STEPS = 40
OUTPUT_TOKENS = 1200
# (name, requests at once, prompt tokens, target in microseconds per step)
CASES = [("decode 64 x 64", 64, 64, 300.0), ("decode 256 x 8k", 256, 8192, 1000.0)]
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k, top_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
}


class NullModel:
    """Scores that favour (last token + 1) mod VOCAB by so much that sampling cannot choose another."""

    def __init__(self, max_rows: int) -> None:
        self._hidden = torch.zeros(max_rows, HIDDEN)
        self._scores = torch.full((VOCAB, VOCAB), -100.0)
        self._scores[torch.arange(VOCAB), (torch.arange(VOCAB) + 1) % VOCAB] = 100.0
        self._last: Tensor = torch.zeros(0, dtype=torch.int64)

    def __call__(self, batch: Batch) -> Tensor:
        # The last token of each row: in steady decoding every token is one; a prompt's row ends where the next begins.
        self._ids = batch.token_ids
        return self._ids[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._scores[hidden[:, 0]]


class NullAttention:
    """Prepares nothing: the model reads none of it."""

    def prepare(self, spans: Spans) -> Any:
        return spans


class Loop:
    """An engine and its rank under steady load: `num_seqs` requests at once."""

    def __init__(self, num_seqs: int, prompt_tokens: int, params: dict[str, Any]) -> None:
        group = KVGroup(0, "full", (0,), None, BLOCK_SIZE, 2, 2, "float32")
        layout = KVLayout((group,))
        max_len = prompt_tokens + OUTPUT_TOKENS + BLOCK_SIZE
        blocks = 2 + num_seqs * (-(-max_len // BLOCK_SIZE) + 2)
        step_tokens = max(8192, prompt_tokens + num_seqs)
        store = KVStore(layout, (blocks,), torch.device("cpu"))
        self.paged = PagedAttention(layout, store.pools, torch.float32)
        self.table = RequestTable(num_seqs, max_len, 1, BLOCK_SIZE)
        self.runner = Runner(NullModel(step_tokens), NullAttention(), store, Sampler(num_seqs, VOCAB), self.table)
        self.scheduler = Scheduler(layout, (blocks,), SchedulerLimits(num_seqs, step_tokens), FcfsPolicy())
        self.executor = InlineExecutor(self._run)
        self.engine = Engine(self.scheduler, self.executor, EngineLimits(max_len, VOCAB, frozenset()))
        self.encode = msgspec.msgpack.Encoder().encode
        self.params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, **params)
        self.got: dict[str, list[int]] = {}
        self.first: dict[str, int] = {}
        self.spans: Spans | None = None
        self.parts: dict[str, list[float]] = {}
        self._wrap()
        rng = random.Random(1)
        for n in range(num_seqs):
            length = prompt_tokens - rng.randrange(BLOCK_SIZE)  # spreads the filling of blocks over steps
            ids = [rng.randrange(VOCAB) for _ in range(length)]
            name = f"r{n}"
            self.got[name], self.first[name] = [], ids[-1]
            message = AddRequest(name, ids, self.params, n, time.monotonic())
            assert not self.engine.handle(message, time.monotonic())

    def _run(self, plan: Any) -> Any:
        return self.runner.run(plan)

    def _wrap(self) -> None:
        """Put timers around the parts."""
        self.runner.run = self._timed("runner", self.runner.run)  # type: ignore[method-assign]
        self.table.prepare = self._timed("inputs", self.table.prepare)  # type: ignore[method-assign]
        sampler = self.runner.sampler
        sampler.sample = self._timed("sampler", sampler.sample)  # type: ignore[method-assign]
        self.runner.model = self._timed_model(self.runner.model)  # type: ignore[assignment]
        self._launch = self._timed("launch", self.engine.launch)
        self._complete = self._timed("complete", self.engine.complete)
        self._encode = self._timed("encode", lambda out: [self.encode(message) for message in out])

    def _timed_model(self, model: NullModel) -> Any:
        """The null model's own time, which is taken off."""
        loop = self

        class Timed:
            def __init__(self) -> None:
                self.forward = loop._timed("null model", model.__call__)
                self.logits = loop._timed("null logits", model.logits)

            def __call__(self, batch: Batch) -> Tensor:
                loop.spans = batch.attention  # type: ignore[assignment]
                return self.forward(batch)

        return Timed()

    def turn(self) -> float:
        """One step, as the live loop makes it; CPU seconds without those of the null model."""
        begin = time.thread_time()
        out = self._launch(time.monotonic())
        result = self.executor.collect()
        out += self._complete(result, time.monotonic())
        self._encode(out)
        elapsed = time.thread_time() - begin
        for message in out:
            if isinstance(message, Tokens):
                for delta in message.deltas:
                    self.got[delta.request_id] += delta.token_ids
        return elapsed - self.parts["null model"][-1] - self.parts["null logits"][-1]

    def prefill(self) -> None:
        """Until every request decodes."""
        self.parts["null logits"].append(0.0)  # the first steps may sample nobody
        while any(not request.num_output for request in self.scheduler.requests.values()):
            self.turn()

    def check(self) -> None:
        """Every request has the tokens that the canned scores say, nothing else."""
        for name, tokens in self.got.items():
            first = self.first[name]
            assert tokens == [(first + 1 + i) % VOCAB for i in range(len(tokens))], f"{name} got wrong tokens"

    def measure(self, num_steps: int) -> dict[str, float]:
        """Microseconds per step: the whole, then the medians of its parts."""
        for times in self.parts.values():
            times.clear()
        gc.collect()
        whole = sorted(1e6 * self.turn() for _ in range(num_steps))
        figures = {
            "step_us_median": statistics.median(whole),
            "step_us_mean": statistics.fmean(whole),
            "step_us_p99": whole[int(0.99 * len(whole))],
        }
        medians = {name: 1e6 * statistics.median(times) for name, times in self.parts.items() if times}
        medians["engine"] = medians.pop("launch") + medians.pop("complete")
        null = medians.pop("null model") + medians.pop("null logits")
        medians["runner"] -= null
        medians["runner rest"] = medians["runner"] - medians["inputs"] - medians["sampler"]
        return {name: round(value, 1) for name, value in figures.items()} | {
            f"{name.replace(' ', '_')}_us": round(value, 1) for name, value in medians.items()
        }

    def attention_us(self, repeats: int) -> float:
        """Median microseconds of preparing the plain-torch attention for the last step."""
        assert self.spans is not None
        times = []
        for _ in range(repeats):
            begin = time.thread_time()
            self.paged.prepare(self.spans)
            times.append(1e6 * (time.thread_time() - begin))
        return round(statistics.median(times), 1)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        times = self.parts.setdefault(name, [])

        def timed(*args: Any) -> Any:
            begin = time.thread_time()
            value = function(*args)
            times.append(time.thread_time() - begin)
            return value

        return timed


def profile(loop: Loop, num_steps: int, lines: int) -> list[str]:
    """The hottest functions of `num_steps` steps, by their own time, with file and line."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(num_steps):
        loop.turn()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()][2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3, help="measurements per case; the best median counts")
    parser.add_argument("--profile-lines", type=int, default=16, help="0: no profile")
    parser.add_argument("--threads", type=int, default=1, help="of torch; nothing here is large enough for two")
    parser.add_argument("--out", type=Path, help="write the lines as a JSON list")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {**machine(), "torch": torch.__version__, "numpy": np.__version__, "commit": _commit()}
    lines = []
    for name, num_seqs, prompt_tokens, target_us in CASES:
        for mode, params in SAMPLING.items():
            loop = Loop(num_seqs, prompt_tokens, params)
            loop.prefill()
            for _ in range(WARM_STEPS):
                loop.turn()
            loop.check()
            num_steps = min(args.steps, (OUTPUT_TOKENS - WARM_STEPS - 400) // args.repeats)
            found = [loop.measure(num_steps) for _ in range(args.repeats)]
            figures = min(found, key=lambda each: each["step_us_median"])
            attention_us = loop.attention_us(30)
            line: dict[str, Any] = {
                "case": name, "sampling": mode, "batch": num_seqs, "steps": num_steps, **figures,
                "target_us": target_us, "met": figures["step_us_median"] < target_us,
                "prepare_torch_attention_us": attention_us, **facts,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
            if args.profile_lines:
                line["profile"] = profile(loop, 50, args.profile_lines)
                print("\n".join(line["profile"]), flush=True)
            loop.check()
            lines.append(line)
    if args.out:
        write_json(args.out, lines)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
