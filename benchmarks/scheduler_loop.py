"""What does the loop itself cost: Python per step, with an executor that computes nothing?

Drives the real Engine (scheduler, blocks, prefix cache, timeline, reporter) with canned results and times its parts in
steady decoding: `plan` and `commit` of the scheduler, `launch` and `complete` of the engine (which contain them), and
the encoding of what is sent to the front end. It is CPU time of the thread, equal to wall time on an idle machine; the
canned executor's is not counted. In the "churn" cases requests end and are replaced all the time, so that admission and
release are in the figure. Before a figure counts, every request must have got exactly its canned tokens. Prints one
JSON line per case, times in microseconds per step, and the hottest functions of a profile; --out writes the lines.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import os
import platform
import pstats
import random
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from penstock.config.model import KVGroup, KVLayout
from penstock.core.plan import StepPlan, StepResult
from penstock.core.policy import FcfsPolicy
from penstock.core.request import SamplingParams
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import AddRequest, Tokens

BLOCK_SIZE = 32
WARM_STEPS = 40
# (name, requests at once, prompt tokens, output tokens, target in microseconds of the whole loop per step)
CASES = [
    ("decode 64 x 64", 64, 64, 1000, 300.0),
    ("decode 256 x 8k", 256, 8192, 1000, 1000.0),
    ("churn 64 x 64 in 32 out", 64, 64, 32, None),
    ("churn 256 x 256 in 128 out", 256, 256, 128, None),
]


class CannedExecutor:
    """Answers every row that samples with the next of its request's canned tokens."""

    feeds_back = True

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        plan = self._plans.popleft()
        # The token after position p is p: every request's output counts up from its prompt's length.
        tokens = [[row.start + row.num_tokens] if row.samples else [] for row in plan.rows]
        return StepResult(plan.step, tokens, seconds=0.0)


class Loop:
    """An engine under steady load: `num_seqs` requests at once, each replaced when it ends."""

    def __init__(self, num_seqs: int, prompt_tokens: int, output_tokens: int, depth: int) -> None:
        group = KVGroup(0, "full", tuple(range(16)), None, BLOCK_SIZE, 8, 128, "bfloat16")
        blocks = 2 + num_seqs * (-(-(prompt_tokens + output_tokens) // BLOCK_SIZE) + 2)
        limits = SchedulerLimits(num_seqs, max(8192, prompt_tokens + num_seqs))
        self.scheduler = Scheduler(KVLayout((group,)), (blocks,), limits, FcfsPolicy(), model_id="bench")
        self.executor = CannedExecutor(depth)
        engine_limits = EngineLimits(prompt_tokens + output_tokens + BLOCK_SIZE, 1 << 30, frozenset())
        self.engine = Engine(self.scheduler, self.executor, engine_limits)
        self.encode = msgspec.msgpack.Encoder().encode
        self.random = random.Random(1)
        self.num_seqs, self.prompt_tokens, self.output_tokens = num_seqs, prompt_tokens, output_tokens
        self.num_added = 0
        self.lengths: dict[str, int] = {}
        self.got: dict[str, list[int]] = {}
        self.num_checked = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in ("plan", "commit", "launch", "complete", "encode")}
        self.scheduler.plan = self._timed("plan", self.scheduler.plan)  # type: ignore[method-assign]
        self.scheduler.commit = self._timed("commit", self.scheduler.commit)  # type: ignore[method-assign]
        self._launch = self._timed("launch", self.engine.launch)
        self._complete = self._timed("complete", self.engine.complete)
        self._encode = self._timed("encode", self._encode_all)
        for _ in range(num_seqs):
            self.add()

    def add(self) -> None:
        """Queue one more request: its own prompt, of a length that spreads the filling of blocks over steps."""
        length = self.prompt_tokens - self.random.randrange(BLOCK_SIZE)
        output = self.output_tokens - self.random.randrange(8)
        name = f"r{self.num_added}"
        self.num_added += 1
        self.lengths[name], self.got[name] = length, []
        first = self.num_added * 16384  # no two prompts share a block
        token_ids = list(range(first, first + length))
        message = AddRequest(name, token_ids, SamplingParams(max_tokens=output), 0, time.monotonic())
        assert not self.engine.handle(message, time.monotonic())

    def turn(self) -> None:
        """One step, as the live loop makes it."""
        out = self._launch(time.monotonic())
        result = self.executor.collect()
        out += self._complete(result, time.monotonic())
        self._encode(out)
        for message in out:
            if isinstance(message, Tokens):
                for delta in message.deltas:
                    self.got[delta.request_id] += delta.token_ids
                    if delta.finish_reason is not None:
                        self._check(delta.request_id)
                        self.add()

    def prefill(self) -> None:
        """Until every one of the first requests has decoded."""
        while any(r.num_output < 1 for r in self.scheduler.requests.values() if int(r.id[1:]) < self.num_seqs):
            self.turn()

    def measure(self, num_steps: int) -> dict[str, float]:
        """Median, mean and 99th percentile of the whole loop, and means of its parts, in microseconds per step."""
        for times in self.seconds.values():
            times.clear()
        gc.collect()
        for _ in range(num_steps):
            self.turn()
        parts = {name: [1e6 * s for s in times] for name, times in self.seconds.items()}
        whole = sorted(map(sum, zip(parts["launch"], parts["complete"], parts["encode"], strict=True)))
        figures = {
            "loop_us_median": statistics.median(whole),
            "loop_us_mean": statistics.fmean(whole),
            "loop_us_p99": whole[int(0.99 * len(whole))],
        }
        for name, times in parts.items():
            figures[f"{name}_us_median"] = statistics.median(times)
        return {name: round(value, 1) for name, value in figures.items()}

    def _check(self, name: str) -> None:
        first = self.lengths.pop(name)
        got = self.got.pop(name)
        assert got == list(range(first, first + len(got))), f"{name} got wrong tokens"
        self.num_checked += 1

    def check_all(self) -> None:
        """Every request so far has its canned tokens, nothing more and nothing less."""
        for name, got in self.got.items():
            assert got == list(range(self.lengths[name], self.lengths[name] + len(got)))

    def _encode_all(self, messages: list[Any]) -> list[bytes]:
        return [self.encode(message) for message in messages]

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        times = self.seconds[name]

        def timed(*args: Any) -> Any:
            begin = time.thread_time()
            value = function(*args)
            times.append(time.thread_time() - begin)
            return value

        return timed


def profile(loop: Loop, num_steps: int, lines: int) -> str:
    """The hottest functions of `num_steps` steps, by their own time."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(num_steps):
        loop.turn()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    body = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join(body[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--profile-lines", type=int, default=14, help="0: no profile")
    parser.add_argument("--out", type=Path, help="write the lines as a JSON list")
    args = parser.parse_args()
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "commit": _commit()}
    lines = []
    for name, num_seqs, prompt_tokens, output_tokens, target_us in CASES:
        loop = Loop(num_seqs, prompt_tokens, output_tokens, args.depth)
        loop.prefill()
        for _ in range(WARM_STEPS):
            loop.turn()
        loop.check_all()
        figures = loop.measure(args.steps)
        loop.check_all()
        line: dict[str, Any] = {"case": name, "batch": num_seqs, "depth": args.depth, "steps": args.steps, **figures}
        if target_us is not None:
            line |= {"target_us": target_us, "met": figures["loop_us_median"] < target_us}
        line |= {**machine, **versions}
        print(json.dumps(line), flush=True)
        if args.profile_lines:
            text = profile(loop, 50, args.profile_lines)
            print(text, flush=True)
            line["profile"] = text.splitlines()
        lines.append(line)
    if args.out:
        args.out.write_text(json.dumps(lines, indent=1) + "\n")


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
