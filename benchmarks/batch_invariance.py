"""What does it cost that a row's result never depends on its batch, its chunks or the number of threads?

    .venv/bin/python benchmarks/batch_invariance.py --out benchmarks/results/batch_invariance.json

Products pay nothing: each output is one sum in the order of its row, whoever computes it. Attention pays: its softmax
is summed in spans of 512 positions, counted from the start of the context, which are merged in order, wherever the work
is divided. This compiles the kernels once more with one span for all of the context, which divides nothing, and runs
the same decode steps on both, in turns: engines in processes of their own, the KV pool filled with random numbers
(Map.cell of decode_map.py). The cost is what the cut kernels take longer; below zero they are faster, for a span's
scores lie in the nearest cache. Needs a compiler; prints a table, --out writes JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CELLS = {  # (batch, context)
    "B": [(1, 512), (1, 2048), (1, 8192), (32, 512), (32, 2048), (32, 8192)],
    "A": [(1, 512), (1, 2048), (1, 8192), (8, 2048)],
}
SPAN = re.compile(r"constexpr int ATTENTION_SPAN = 512;")
EXACT_INTEGERS = re.compile(r"static_assert\(32767LL \* 127 \* ATTENTION_SPAN[^;]*;")  # of int8 KV, not run here
POOL_BYTES = {"B": 1 << 30, "A": 2 << 30}
MAX_CONTEXT = 8192


def build(workdir: Path, span: int) -> Path:
    """A directory with the native library, its attention cut every `span` positions."""
    source, target = workdir / f"source-{span}", workdir / f"span-{span}"
    shutil.copytree(ROOT / "native", source)
    for name, pattern, text in (
        ("kernels.hpp", SPAN, f"constexpr int ATTENTION_SPAN = {span};"),
        ("attention.inc.hpp", EXACT_INTEGERS, ""),
    ):
        file = source / "src" / name
        replaced, count = pattern.subn(text, file.read_text(encoding="utf-8"))
        assert count == 1, f"{name} has changed: {pattern.pattern} occurs {count} times"
        file.write_text(replaced, encoding="utf-8")
    nanobind = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    cmake = [sys.executable, "-m", "cmake"]
    configure = ["-S", str(source), "-B", str(target), f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([*cmake, *configure, f"-Dnanobind_DIR={nanobind}"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*cmake, "--build", str(target), "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return target


class Variant:
    """A process with one model and one library; `cell` asks it for a decode step's figures."""

    def __init__(self, library: Path, model: str) -> None:
        command = [sys.executable, __file__, "--worker", str(library), "--models", model]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def cell(self, batch: int, context: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([batch, context]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "a worker ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def work(library: str, model: str) -> None:
    """Answer requests from standard input with the library in that directory."""
    import penstock

    spec = PathFinder.find_spec("penstock._native", [library])
    assert spec is not None and spec.loader is not None, f"no library in {library}"
    # Before anybody can import the installed one.
    penstock._native = sys.modules["penstock._native"] = module_from_spec(spec)
    spec.loader.exec_module(penstock._native)
    from decode_map import Map
    from real_shapes import model_settings

    with tempfile.TemporaryDirectory() as workdir:
        settings = model_settings(model, Path(workdir))
        found = Map(settings, "bf16", max(batch for batch, _ in CELLS[model]), MAX_CONTEXT, POOL_BYTES[model])
    for line in sys.stdin:
        print(json.dumps(found.cell(*json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="B,A", help="A: Qwen3-0.6B's shape, B: penstock-tiny [B,A]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.models)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    from penstock.bench.flags import machine, write_json

    rows = []
    with tempfile.TemporaryDirectory() as workdir:
        libraries = {name: build(Path(workdir), span) for name, span in (("cut", 512), ("whole", MAX_CONTEXT))}
        print(f"{'model':<6}{'batch':>6}{'context':>9}{'step cut':>12}{'whole':>9}{'cost':>8}"
              f"{'attention cut':>16}{'whole':>9}{'cost':>8}")  # fmt: skip
        for model in args.models.split(","):
            variants = {name: Variant(library, model) for name, library in libraries.items()}
            for batch, context in CELLS[model]:
                cells: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
                for _ in range(args.rounds):
                    for name, variant in variants.items():
                        cells[name].append(variant.cell(batch, context))
                rows.append(row := _row(model, batch, context, cells))
                print(f"{model:<6}{batch:>6}{context:>9}{row['step_ms']['cut']:>9.2f} ms{row['step_ms']['whole']:>9.2f}"
                      f"{row['step_cost']:>+8.1%}{row['attention_ms']['cut']:>13.2f} ms"
                      f"{row['attention_ms']['whole']:>9.2f}{row['attention_cost']:>+8.1%}", flush=True)  # fmt: skip
            for variant in variants.values():
                variant.close()
    if args.out:
        write_json(args.out, {**machine(), "rounds": args.rounds, "rows": rows})


def _row(model: str, batch: int, context: int, cells: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both, and of the ratios of neighbours in time."""
    steps = {name: [cell["step_ms"] for cell in of] for name, of in cells.items()}
    attention = {name: [cell["operations_ms"]["attend"] for cell in of] for name, of in cells.items()}

    def cost(times: dict[str, list[float]]) -> float:
        return round(statistics.median(a / b for a, b in zip(times["cut"], times["whole"], strict=True)) - 1, 4)

    return {
        "model": model,
        "batch": batch,
        "context": context,
        "step_ms": {name: round(statistics.median(of), 3) for name, of in steps.items()},
        "step_cost": cost(steps),
        "attention_ms": {name: round(statistics.median(of), 3) for name, of in attention.items()},
        "attention_cost": cost(attention),
    }


if __name__ == "__main__":
    main()
