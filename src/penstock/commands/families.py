"""Verbs with a second word, `bench serve` or `train lm`: a table of modules that bring their own flags.

Each module has `main(arguments) -> exit code` and is imported when it is asked for.
"""

from __future__ import annotations

import importlib

from penstock.config.values import ConfigError, suggestion

BENCH = {
    "serve": ("penstock.bench.serve", "load a running server: throughput, TTFT, per-token latency"),
    "throughput": ("penstock.bench.throughput", "many prompts offline, as fast as they go"),
    "latency": ("penstock.bench.latency", "one batch offline, again and again"),
    "kernels": ("penstock.bench.kernels", "native kernels beside what this machine can do"),
    "startup": ("penstock.bench.startup", "from the command to the first answer"),
}
TRAIN = {"lm": ("penstock.training.lm", "a language model from a recipe and a corpus")}


def bench(arguments: list[str]) -> int:
    return _dispatch("bench", BENCH, arguments)


def train(arguments: list[str]) -> int:
    return _dispatch("train", TRAIN, arguments)


def _dispatch(verb: str, table: dict[str, tuple[str, str]], arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: penstock {verb} {{{','.join(table)}}} ...\n")
        for name, (_, text) in table.items():
            print(f"  {name:<12} {text}")
        print(f"\npenstock {verb} NAME --help explains one")
        return 0 if arguments else 2
    name = arguments[0]
    if name not in table:
        close = suggestion(name, table) or f"; there is {', '.join(table)}"
        raise ConfigError(f"penstock {verb} has no {name!r}{close}")
    return int(importlib.import_module(table[name][0]).main(arguments[1:]))
