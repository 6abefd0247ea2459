"""What every peer's process shares: questions as lines of JSON on stdin, answers as lines of JSON on stdout.

A peer implements `Engine` and calls `main(prepare, open_engine)`. The process runs in the peer's own environment, so
this file uses the standard library alone. Knows nothing of any engine, of works or of what is compared.

    {"prompts": [[ids]], "num_output": n}  ->  {"seconds": s, "tokens": [[ids]]}       exactly n tokens a prompt
    {"scores": [ids], "of": [ids]}         ->  {"best": x, "of": [x]}                  only where the engine has scores
    {"memory": true}                       ->  {"peak_rss_bytes": n, "rss_bytes": n, "settings": {}}   with its children
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Tokens of KV that engines with a pool of fixed size get, by checkpoint: more than any work needs at once. An engine
# that shares no prefix needs more for A (32 prompts of 576 + 16). No larger, because a group's engines are up together.
KV_TOKENS = {"A": 16384, "B": 24576}
KV_TOKENS_UNSHARED = {"A": 20480, "B": 24576}
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 256


@dataclass(frozen=True)
class Settings:
    """What a process is told. `model`: the bf16 checkpoint; `prepared`: what the peer made of it for this variant."""

    model: Path
    prepared: Path
    variant: str
    threads: int
    option: str


class Engine(Protocol):
    """`settings` goes into the result file: versions, and what was set so that others can set it too."""

    settings: dict[str, Any]

    def run(self, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
        """(seconds, token ids): greedy, end-of-sequence ignored, all prompts handed over at once."""
        ...

    def close(self) -> None: ...


def model_shape(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def kv_cache_bytes(model: Path, bytes_per_value: int = 2) -> int:
    """Of the model's KV_TOKENS."""
    shape = model_shape(model)
    per_layer = 2 * shape["num_key_value_heads"] * shape["head_dim"] * bytes_per_value
    return int(KV_TOKENS[model.name] * shape["num_hidden_layers"] * per_layer)


def main(open_engine: Callable[[Settings], Engine], prepare: Callable[[Settings], None] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--option", default="")
    parser.add_argument("--prepare", action="store_true", help="write what this variant needs, then end")
    args = parser.parse_args()
    settings = Settings(args.model, args.prepared, args.variant, args.threads, args.option)
    if args.prepare:
        if prepare is not None:
            prepare(settings)
        return
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not into the answers
    engine = open_engine(settings)
    print(json.dumps({"settings": engine.settings}), file=out, flush=True)
    try:
        for line in sys.stdin:  # until the harness closes it
            print(json.dumps(_answer(engine, json.loads(line))), file=out, flush=True)
    finally:
        engine.close()


def _answer(engine: Engine, asked: dict[str, Any]) -> dict[str, Any]:
    if "memory" in asked:
        return {"peak_rss_bytes": _memory("VmHWM"), "rss_bytes": _memory("VmRSS"), "settings": engine.settings}
    if "scores" in asked:
        return engine.scores(asked["scores"], asked["of"])  # type: ignore[attr-defined, no-any-return]
    seconds, tokens = engine.run(asked["prompts"], asked["num_output"])
    return {"seconds": seconds, "tokens": tokens}


def _memory(field: str) -> int:
    """Bytes of this process and all below it."""
    total, todo = 0, [os.getpid()]
    while todo:
        pid = todo.pop()
        total += process_memory(field, pid)
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        except OSError:
            continue
        todo += [int(each) for each in children.split()]
    return total


def process_memory(field: str, pid: int | None = None) -> int:
    """Bytes that /proc states under `field` (VmRSS, VmHWM); 0 where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid or os.getpid()}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
