"""What does a whole step cost besides the model: Python of engine, runner inputs and sampler, with nothing to compute?

Drives the real Engine, InlineExecutor, Runner, RequestTable and Sampler in steady decoding, as the live loop does. The
model is null: it gives canned scores over a vocabulary of 128, so that what is left is interpreter and array overhead,
not arithmetic. Attention is null too; what preparing the plain-torch one costs per step (index tensors and masks, the
share of a kernel) is measured apart and printed beside. Times are CPU time of the one thread that does it all, so that
a busy machine adds little: nothing in a step waits. Before a figure counts, every request must have got exactly the
tokens that its canned scores say. Prints one JSON line per case, times in microseconds per step, and the hottest
functions of a profile; --out writes the lines as JSON. Targets are set for greedy steps; the other lines show what
drawing noise and filtering add. `scheduler_loop.py` is the same for the engine alone.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
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
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.garbage import rare_collections
from penstock.engine.messages import AddRequest, Tokens
from penstock.engine.ranks import InlineExecutor
from penstock.nn.doors import Batch, Spans
from penstock.nn.kernels.attention import PagedAttention
from penstock.nn.kernels.sampling import DenseScores
from penstock.runner.inputs import RequestTable
from penstock.runner.kv_store import KVStore
from penstock.runner.runner import Runner
from penstock.runner.sampler import Sampler

BLOCK_SIZE, VOCAB = 32, 128
WARM_STEPS = 40
MAX_STEPS = 1100  # measured, per case; a measurement takes 2.5 times --steps
OUTPUT_TOKENS = 1600  # so that nobody ends before: the first requests decode while the last prompts are computed
# (name, requests at once, prompt tokens, target in microseconds per step)
CASES = [("decode 64 x 64", 64, 64, 300.0), ("decode 256 x 8k", 256, 8192, 1000.0)]
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k, top_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
}


class NullModel:
    """Scores that favour (last token + 1) mod VOCAB by so much that sampling cannot choose another."""

    def __init__(self) -> None:
        self._scores = torch.full((VOCAB, VOCAB), -100.0)
        self._scores[torch.arange(VOCAB), (torch.arange(VOCAB) + 1) % VOCAB] = 100.0
        self.seconds = 0.0  # CPU time of the last step in here, which is not a step's overhead
        self.spans: Spans | None = None

    def __call__(self, batch: Batch) -> Tensor:
        self.seconds = 0.0
        self.spans = batch.attention  # type: ignore[assignment]
        return (batch.token_ids if batch.outputs is None else batch.token_ids[batch.outputs])[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        begin = time.thread_time()
        scores = self._scores[hidden[:, 0]]
        self.seconds += time.thread_time() - begin
        return scores

    def scores(self, hidden: Tensor) -> DenseScores:
        return DenseScores(self.logits(hidden))

    def scores_after(self, batch: Batch) -> DenseScores:
        return self.scores(self(batch))


class NullAttention:
    """Prepares nothing: the model reads none of it."""

    def prepare(self, spans: Spans, words: Any = None) -> Any:
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
        self.model = NullModel()
        self.runner = Runner(self.model, NullAttention(), Sampler(num_seqs, VOCAB), self.table)
        self.scheduler = Scheduler(layout, (blocks,), SchedulerLimits(num_seqs, step_tokens), FcfsPolicy())
        self.executor = InlineExecutor(self._run)
        self.engine = Engine(self.scheduler, self.executor, EngineLimits(max_len, VOCAB, frozenset()))
        self.encode = msgspec.msgpack.Encoder().encode
        self.params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, **params)
        self.got: dict[str, list[int]] = {}
        self.first: dict[str, int] = {}
        self.parts: dict[str, list[float]] = {}
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

    def turn(self) -> float:
        """One step, as the live loop makes it; CPU seconds without those of the null model."""
        begin = time.thread_time()
        out = self.engine.launch(time.monotonic())
        result = self.executor.collect()
        out += self.engine.complete(result, time.monotonic())
        for message in out:
            self.encode(message)
        elapsed = time.thread_time() - begin
        for message in out:
            if isinstance(message, Tokens):
                for delta in message.deltas:
                    self.got[delta.request_id] += delta.token_ids
        return elapsed - self.model.seconds

    def prefill(self) -> None:
        """Until every request decodes."""
        while any(not request.num_output for request in self.scheduler.requests.values()):
            self.turn()

    def check(self) -> None:
        """Every request has the tokens that the canned scores say, nothing else."""
        for name, tokens in self.got.items():
            first = self.first[name]
            assert tokens == [(first + 1 + i) % VOCAB for i in range(len(tokens))], f"{name} got wrong tokens"

    def measure(self, num_steps: int) -> dict[str, float]:
        """Microseconds per step: the whole without any timer inside, then medians of its parts with them."""
        gc.collect()
        with rare_collections():  # as in an engine's process
            whole = sorted(1e6 * self.turn() for _ in range(num_steps))
        often = statistics.fmean(1e6 * self.turn() for _ in range(num_steps))
        self._wrap()
        for _ in range(num_steps // 2):
            self.turn()
        self._unwrap()
        parts = {name: 1e6 * statistics.median(times) for name, times in self.parts.items()}
        self.parts.clear()
        parts["runner rest"] = parts["runner"] - parts["inputs"] - parts["sampler"] - parts.pop("null logits")
        del parts["runner"]
        return {
            "step_us_median": round(statistics.median(whole), 1),
            "step_us_mean": round(statistics.fmean(whole), 1),
            "step_us_mean_python_thresholds": round(often, 1),
            "step_us_p99": round(whole[int(0.99 * len(whole))], 1),
            **{f"{name.replace(' ', '_')}_us": round(value, 1) for name, value in parts.items()},
        }

    def _places(self) -> list[tuple[Any, str, str]]:
        """(object, method, part) of what is timed."""
        return [
            (self.engine, "launch", "engine launch"),
            (self.engine, "complete", "engine complete"),
            (self.runner, "run", "runner"),
            (self.table, "prepare", "inputs"),
            (self.runner.sampler, "sample", "sampler"),
            (self.model, "logits", "null logits"),
            (self, "encode", "encode"),
        ]

    def _wrap(self) -> None:
        for owner, method, part in self._places():
            setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _unwrap(self) -> None:
        for owner, method, _ in self._places():
            setattr(owner, method, getattr(owner, method).__wrapped__)

    def attention_us(self, repeats: int) -> float:
        """Median microseconds of preparing the plain-torch attention for the last step."""
        spans = self.model.spans
        assert spans is not None
        times = []
        for _ in range(repeats):
            begin = time.thread_time()
            self.paged.prepare(spans)
            times.append(1e6 * (time.thread_time() - begin))
        return round(statistics.median(times), 1)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        times = self.parts.setdefault(name, [])

        @functools.wraps(function)
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
    gc.freeze()  # as engines do: what was imported stays
    facts = {**machine(), "torch": torch.__version__, "numpy": np.__version__, "commit": _commit()}
    lines = []
    for name, num_seqs, prompt_tokens, target_us in CASES:
        for mode, params in SAMPLING.items():
            loop = Loop(num_seqs, prompt_tokens, params)
            loop.prefill()
            for _ in range(WARM_STEPS):
                loop.turn()
            loop.check()
            num_steps = min(args.steps, int(MAX_STEPS / (2.5 * args.repeats)))
            found = [loop.measure(num_steps) for _ in range(args.repeats)]
            figures = min(found, key=lambda each: each["step_us_median"])
            attention_us = loop.attention_us(30)
            line: dict[str, Any] = {
                "case": name, "sampling": mode, "batch": num_seqs, "steps": num_steps, **figures,
                **({"target_us": target_us, "met": figures["step_us_median"] < target_us} if mode == "greedy" else {}),
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
