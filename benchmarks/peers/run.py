"""How fast is penstock beside its peers, each at its best settings, on the same machine in the same minutes?

    .venv/bin/python benchmarks/peers/run.py --workdir DIR [--peers transformers vllm ...] [--works stream batch ...]

Works (works.py) are done on synthetic checkpoints of real shape by penstock, transformers, vLLM, OpenVINO GenAI and
llama.cpp. Weights of 16, 8 and 4 bits are compared each among themselves. All get the same token ids and threads, are
greedy and make exactly the tokens asked for. Every engine has a process and an environment of its own, made here from
pinned versions (install.py), and is confined to the same cores; it waits on a pipe while it is not its turn. Engines
take turns within each round, in rotating order, with new prompts in every round; the machine's own bandwidth is
measured in the same rounds. Medians; the ratio is penstock's figure over the best peer's. Decode works are also told
as a share of the memory roofline: the bytes a step must read (weights at the group's width, bf16 KV) over bandwidth.

Before bf16 is timed, tokens must agree (E1) with transformers' where it is among the peers. A peer that cannot be
installed, started or asked is in the result with its reason. Writes JSON after every work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import checkpoint
from engines import EngineFailed, EngineProcess, Line, Spec, prepare
from install import RECIPES, install
from works import FIRST_ORDINARY_ID, GROUPS, STARTUP, STARTUP_TITLE, WORKS, WORKS_OF, Work

from penstock.bench.flags import machine, write_json

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "peers.json"
OURS = "penstock"
REFERENCE = "transformers"
TOLERANCE = 2e-2  # how far apart the best two bf16 scores may lie where rounding may decide (DESIGN section 1, E1)
CHECK = (8, 64, 8)  # requests, tokens in, tokens out of the token check
WARM_UP = 1_000_000  # numbers of prompts that no round has
REST_S = 0.3  # before a turn: threads of the engine before may spin on for a while (libiomp5: 0.2 s)
SLOW_TURN_S = 10.0  # shorter ones are measured in all rounds: an engine's first turn, alone, would tell too little
SLOW_START_S = 30.0  # an engine that takes longer is started once, not --starts times


class Harness:
    """One run of the benchmark: what was asked, the engines that are up, and the result so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.workdir: Path = args.workdir.resolve()
        self.cores = sorted(os.sched_getaffinity(0))[: args.threads]
        if len(self.cores) < args.threads:
            raise SystemExit(f"--threads {args.threads}: only {len(self.cores)} cores are given to this process")
        self.begin_s = time.perf_counter()
        self.unavailable: list[dict[str, str]] = []
        self.engine_settings: dict[str, Any] = {}
        self.works: list[dict[str, Any]] = []
        self.tokens: dict[str, Any] = {}
        self.ceilings = self._open_ceilings()
        self.peak = {kind: [self._ceiling(kind)] for kind in ("read", "bfloat16", "float32")}

    def _open_ceilings(self) -> Line:
        command = [sys.executable, str(HERE / "ceilings_worker.py"), str(self.args.threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(self.args.threads)}
        return Line(command, env, self.cores, self.workdir / "logs" / "ceilings.log", 120.0)

    def _ceiling(self, kind: str) -> float:
        return float(self.ceilings.ask({"kind": kind})["per_s"])

    # ---- engines ----

    def specs(self, model: Path, group: str) -> list[Spec]:
        found = []
        for peer, variants in GROUPS[group].items():
            if peer != OURS and peer not in self.args.peers:
                continue
            options = self.args.kernels if peer == OURS else [""]
            found += [Spec(peer, variant, model, option) for variant in variants for option in options]
        return found

    def installed(self) -> list[str]:
        ready = []
        for peer in self.args.peers:
            reason = install(peer, self.workdir)
            if reason is None:
                ready.append(peer)
            else:
                self._missing(peer, "", f"not installed: {reason}")
        return ready

    def _missing(self, engine: str, model: str, reason: str) -> None:
        self.unavailable.append({"engine": engine, "model": model, "reason": reason})
        print(f"  without {engine} {model}: {reason}", flush=True)

    def start(self, spec: Spec) -> EngineProcess | None:
        if spec.name in self.args.without:
            self._missing(spec.name, spec.model.name, "left out by --without")
            return None
        try:
            prepare(spec, self.args.threads, self.workdir)
            engine = EngineProcess(spec, self.args.threads, self.cores, self.workdir, self.args.timeout)
        except EngineFailed as failure:
            self._missing(spec.name, spec.model.name, str(failure))
            return None
        self.engine_settings[f"{spec.model.name} {spec.name}"] = engine.settings
        return engine

    def run_group(self, model: Path, group: str, works: list[Work]) -> None:
        print(f"{model.name} {group}: starting engines", flush=True)
        engines: dict[str, EngineProcess] = {}
        try:
            for spec in self.specs(model, group):
                engine = self.start(spec)
                if engine is not None:
                    engines[spec.name] = engine
                    print(f"  {spec.name} is up after {engine.ready_s:.1f} s", flush=True)
            if group == "bf16":
                self.check_tokens(model, engines)
            for work in works:
                self.run_work(work, group, model, engines)
                self.write()
            for name, engine in engines.items():
                memory = engine.ask({"memory": True})
                found_out = memory.pop("settings")  # while it ran, as batch sizes
                self.engine_settings[f"{model.name} {name}"] |= {**found_out, "after_works": memory}
        finally:
            for engine in engines.values():
                engine.close()

    # ---- are the tokens right? ----

    def check_tokens(self, model: Path, engines: dict[str, EngineProcess]) -> None:
        """Every first difference from the reference must be one that rounding may decide; else nothing is timed."""
        reference = next((name for name in engines if name.startswith(REFERENCE)), None)
        if reference is None:
            return
        num, num_input, num_output = CHECK
        vocab_size = _config(model)["vocab_size"]
        prompts = np.random.default_rng(0).integers(FIRST_ORDINARY_ID, vocab_size, (num, num_input)).tolist()
        answers = {name: engine.run(prompts, num_output)[1] for name, engine in engines.items()}
        found = {}
        for name, tokens in answers.items():
            gaps = []
            for prompt, one, other in zip(prompts, answers[reference], tokens, strict=True):
                at = next((i for i in range(num_output) if one[i] != other[i]), None)
                if at is not None:
                    asked = {"scores": prompt + one[:at], "of": [one[at], other[at]]}
                    gaps.append(_gap(engines[reference].ask(asked)))
            largest = max(gaps, default=0.0)
            agree = bool(largest <= TOLERANCE)
            found[name] = {"requests": num, "equal": num - len(gaps), "max_gap_beyond_rounding": round(largest, 4),
                           "agree": agree}  # fmt: skip
        self.tokens[model.name] = found
        print(
            f"  tokens beside {reference}'s: { {name: each['equal'] for name, each in found.items()} } of {num} equal"
        )
        wrong = [name for name, each in found.items() if name.startswith(OURS) and not each["agree"]]
        if wrong:
            self.write()
            raise SystemExit(f"tokens of {', '.join(wrong)} are wrong: nothing is timed ({found})")

    # ---- works ----

    def run_work(self, work: Work, group: str, model: Path, engines: dict[str, EngineProcess]) -> None:
        vocab_size = _config(model)["vocab_size"]
        seconds: dict[str, list[float]] = {}
        prefill: dict[str, list[float]] = {}
        reads = []

        def turn(name: str, number: int) -> tuple[float, float]:
            first_s = 0.0
            time.sleep(REST_S)
            if work.prefill_too:
                first_s, _ = engines[name].run(work.prompts(vocab_size, number, probe=True), 1)
            return first_s, engines[name].run(work.prompts(vocab_size, number), work.num_output)[0]

        def drop(name: str, failure: EngineFailed) -> None:
            self._missing(name, model.name, f"during {work.name}: {failure}")
            engines.pop(name).close()
            seconds.pop(name, None)

        warm: dict[str, tuple[float, float]] = {}
        for name in list(engines):
            try:
                warm[name] = turn(name, WARM_UP)
            except EngineFailed as failure:
                drop(name, failure)
        fastest_s = min((times[1] for times in warm.values()), default=0.0)
        limit_s = max(self.args.slow_factor * fastest_s, SLOW_TURN_S)
        for number in range(1, self.args.rounds + 1):
            reads.append(self._ceiling("read"))
            names = list(engines)
            at = number % max(len(names), 1)
            for name in names[at:] + names[:at]:
                done = seconds.setdefault(name, [])
                if len(done) >= self.args.slow_rounds and statistics.median(done or [warm[name][1]]) > limit_s:
                    continue
                try:
                    first_s, elapsed_s = turn(name, number)
                except EngineFailed as failure:
                    drop(name, failure)
                    continue
                done.append(elapsed_s)
                prefill.setdefault(name, []).append(first_s)
        for name, done in seconds.items():
            if not done:  # with --slow-rounds 0
                first_s, elapsed_s = warm[name]
                done.append(elapsed_s)
                prefill[name] = [first_s]
        self.peak["read"] += reads
        found = {name: _figures(work, times, prefill[name]) for name, times in seconds.items()}
        bandwidth = statistics.median(reads)
        if work.prefill_too:
            per_s = bandwidth / work.decode_step_bytes(_config(model), group) * work.num_requests
            for figures in found.values():
                figures["share_of_roofline"] = round(figures["decode_tokens_per_s"] / per_s, 3)
        entry = {"work": work.name, "title": work.title, "group": group, "figure": work.figure}
        self.works.append({**entry, "read_gb_per_s": round(bandwidth / 1e9, 1), **_compare(work, found)})
        _show(self.works[-1])

    def run_startup(self, model: Path, group: str) -> None:
        """One engine at a time: from the start of its process to the first token, and what it takes of memory."""
        work = WORKS["ttft"]
        config = _config(model)
        found: dict[str, Any] = {}
        for spec in self.specs(model, group):
            times: list[float] = []
            memory: dict[str, Any] = {}
            for number in range(self.args.starts + 1):  # the first one warms the files
                engine = self.start(spec)
                if engine is None:
                    break
                try:
                    engine.run(work.prompts(config["vocab_size"], number), 1)
                    elapsed_s = time.perf_counter() - engine.started_s
                    memory = engine.ask({"memory": True})
                except EngineFailed as failure:
                    self._missing(spec.name, model.name, f"during {STARTUP}: {failure}")
                    break
                finally:
                    engine.close()
                if number or elapsed_s > SLOW_START_S:
                    times.append(elapsed_s)
                if elapsed_s > SLOW_START_S:
                    break
            if times:
                known = self.engine_settings[f"{model.name} {spec.name}"]
                found[spec.name] = {
                    "median_s": round(statistics.median(times), 3),
                    "seconds": [round(each, 3) for each in times],
                    "peak_rss_mb": round(memory["peak_rss_bytes"] / 1e6),
                    "rss_mb": round(memory["rss_bytes"] / 1e6),
                }
                if "rss_after_torch_bytes" in known:
                    found[spec.name]["rss_after_torch_mb"] = round(known["rss_after_torch_bytes"] / 1e6)
        work_bytes = Work("", "", "", 0, 0, 0, "").decode_step_bytes(config, group)
        entry = {"work": STARTUP, "title": STARTUP_TITLE, "group": group, "figure": "seconds"}
        self.works.append({**entry, "weights_mb": round(work_bytes / 1e6), **_compare(work, found)})
        _show(self.works[-1])
        self.write()

    def write(self) -> None:
        facts = {
            "works": self.works,
            "unavailable": self.unavailable,
            "tokens_beside_transformers": self.tokens,
            "threads": self.args.threads,
            "cores": self.cores,
            "rounds": self.args.rounds,
            "ceilings": {
                "read_gb_per_s": _spread(self.peak["read"], 1e9),
                "bfloat16_gflop_per_s": _spread(self.peak["bfloat16"], 1e9),
                "float32_gflop_per_s": _spread(self.peak["float32"], 1e9),
            },
            "engines": self.engine_settings,
            "seconds_in_all": round(time.perf_counter() - self.begin_s),
            "command": " ".join(["benchmarks/peers/run.py", *sys.argv[1:]]),
            **machine(),
        }
        # Results are for everybody: where the environments lay is not.
        text = json.dumps(facts).replace(str(self.args.workdir), "DIR")
        write_json(self.args.out, json.loads(text))


def _config(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _gap(scores: dict[str, Any]) -> float:
    """How far the worse of two tokens is from the best score, beyond what rounding both passes to bf16 explains."""
    best = scores["best"]
    grid = 2.0 ** (np.floor(np.log2(abs(best))) - 7) if best else 0.0
    return max(0.0, float(best - min(scores["of"]) - 2 * grid))


def _spread(values: list[float], unit: float) -> dict[str, float]:
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value / unit, 1) for name, value in named.items()}


def _figures(work: Work, seconds: list[float], prefill: list[float]) -> dict[str, Any]:
    median_s = statistics.median(seconds)
    found: dict[str, Any] = {"median_s": round(median_s, 4), "seconds": [round(each, 4) for each in seconds]}
    if work.num_output > 1:
        found["output_tokens_per_s"] = round(work.num_requests * work.num_output / median_s, 2)
    if work.prefill_too:
        decode_s = statistics.median(whole - first for whole, first in zip(seconds, prefill, strict=True))
        found["prefill_median_s"] = round(statistics.median(prefill), 4)
        decoded = work.num_requests * (work.num_output - 1)
        found["decode_tokens_per_s"] = round(decoded / max(decode_s, 1e-9), 2)
    return found


def _compare(work: Work, found: dict[str, Any]) -> dict[str, Any]:
    """Ratios over 1 mean that penstock is the faster one."""
    speeds = {}
    for name, figures in found.items():
        if work.figure == "decode":
            speeds[name] = figures["decode_tokens_per_s"]
        else:
            speeds[name] = 1 / figures["median_s"]
    peers = [name for name in speeds if not name.startswith(OURS)]
    best = max(peers, key=speeds.__getitem__, default=None)
    ratios = {name: round(speeds[name] / speeds[best], 3) for name in speeds if best and name.startswith(OURS)}
    return {"engines": found, "best_peer": best, "ratio_over_best_peer": ratios}


def _show(entry: dict[str, Any]) -> None:
    print(f"{entry['title']}, {entry['group']}")
    for name, figures in entry["engines"].items():
        told = f"  {name:<22} {figures['median_s']:>9.3f} s"
        if "output_tokens_per_s" in figures:
            told += f" {figures['output_tokens_per_s']:>10.1f} output tok/s"
        if "decode_tokens_per_s" in figures:
            told += f" {figures['decode_tokens_per_s']:>10.1f} decode tok/s"
        if "share_of_roofline" in figures:
            told += f" {figures['share_of_roofline']:>6.0%} of the roofline"
        if "peak_rss_mb" in figures:
            told += f" {figures['peak_rss_mb']:>6} MB at peak"
        ratio = entry["ratio_over_best_peer"].get(name)
        print(told + (f"   {ratio:.2f}x {entry['best_peer']}" if ratio else ""), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*WORKS, STARTUP]
    parser.add_argument("--workdir", type=Path, required=True, help="environments, checkpoints, logs: about 15 GB")
    parser.add_argument("--peers", nargs="*", default=list(RECIPES), choices=list(RECIPES), metavar="PEER")
    works_help = f"{' '.join(names)} [of each group those it is chosen for]"
    parser.add_argument("--works", nargs="+", choices=names, metavar="WORK", help=works_help)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS), metavar="GROUP")
    parser.add_argument(
        "--kernels", nargs="+", default=["auto"], help="penstock's --cpu-kernels, each an engine [auto]"
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="ENGINE", help="leave out, e.g. vllm:int4")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help=f"measured starts for {STARTUP} [3]")
    parser.add_argument(
        "--slow-factor", type=float, default=8.0, help="slow: over 10 s and over this times the fastest [8]"
    )
    parser.add_argument(
        "--slow-rounds", type=int, default=2, help="rounds that a slow engine takes part in; 0: its warm-up counts [2]"
    )
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds an engine may take for one answer")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    harness = Harness(args)
    try:
        args.peers = harness.installed()
        for model_name in sorted({work.model for work in WORKS.values()}):
            for group in args.groups:
                asked = args.works or WORKS_OF[group]
                works = [work for name, work in WORKS.items() if name in asked and work.model == model_name]
                if works:
                    harness.run_group(checkpoint(model_name, harness.workdir), group, works)
        for group in args.groups:
            if STARTUP in (args.works or WORKS_OF[group]):
                harness.run_startup(checkpoint("A", harness.workdir), group)
        for kind in ("read", "bfloat16", "float32"):
            harness.peak[kind].append(harness._ceiling(kind))
    finally:
        harness.ceilings.close()
    harness.write()
    print(f"{(time.perf_counter() - harness.begin_s) / 60:.1f} minutes; figures are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
