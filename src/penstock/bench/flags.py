"""What the benchmarks' command lines share: reading flags, engine settings, the model and its tokenizer, result files.

Knows flags and directories. Does not know what is measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import penstock
from penstock.config.flags import FlagParser, HelpRequested, given_settings
from penstock.config.load import model_directory, resolve
from penstock.config.schema import Config, settings
from penstock.config.values import ConfigError
from penstock.engine.tokenizer import Tokenizer, load_tokenizer

ENGINE_SECTIONS = ("model", "cache", "scheduler", "runtime")


def parse(parser: FlagParser, arguments: list[str]) -> argparse.Namespace | None:
    """The parsed arguments; None after help was printed because it was asked for. Raises ConfigError."""
    try:
        return parser.parse(arguments)
    except HelpRequested as wanted:
        print(parser.help_text(wanted.topic), end="")
        return None


def add_model(parser: FlagParser) -> None:
    """The positional MODEL beside --model."""
    parser.add_argument(
        "positional_model", nargs="?", metavar="MODEL", help="model directory or built-in model [penstock-tiny]"
    )


def engine_config(parsed: argparse.Namespace, **defaults: Any) -> Config:
    """The engine's settings from flags, environment and file. `defaults` stand where the command line says nothing."""
    given = {**defaults, **given_settings(parsed)}
    if parsed.positional_model is not None:
        if given.get("model", parsed.positional_model) != parsed.positional_model:
            raise ConfigError(f"two models were given: {parsed.positional_model} and {given['model']}")
        given["model"] = parsed.positional_model
    return resolve(given, config_file=parsed.config_file, foreign=getattr(parsed, "foreign", ()))


def open_llm(config: Config) -> Any:
    """An `LLM` with what the user set in any way. Through the package's lazy door, so that `--help` needs no torch."""
    return penstock.LLM(**chosen_settings(config))


def chosen_settings(config: Config) -> dict[str, Any]:
    """What the user set in any way, as keyword arguments of `LLM`."""
    return {
        name: getattr(getattr(config, item.section), name)
        for name, item in settings().items()
        if config.origins[name][0] in ("file", "env", "flag")
    }


def find_tokenizer(candidates: Iterable[str | None]) -> tuple[str, Tokenizer] | None:
    """(name, tokenizer) of the first candidate that is a built-in model or a directory here; None if none is."""
    for name in candidates:
        if name:
            try:
                return name, load_tokenizer(model_directory(name))
            except ConfigError:
                continue
    return None


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: for result files."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return {
        "machine": model or platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "penstock": penstock.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the checkout that this package runs from; None when it is installed."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def write_json(path: str | Path, data: Any) -> None:
    """One JSON document, its directory made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
