"""The `penstock` command: verbs, exit codes, and one clear line for what went wrong.

A table of names only: the module of a verb is imported when the verb is used, so that `penstock --help` costs
nothing. Does not know what any verb does.

Exit codes: 0 done, 1 it could not be done, 2 the command line was wrong, 70 a bug of ours, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from penstock import __version__
from penstock.config.load import debug_wanted
from penstock.config.openmp import bound_spinning
from penstock.config.values import ConfigError, suggestion

# verb -> (module, function taking the remaining arguments and returning an exit code, help line)
VERBS: dict[str, tuple[str, str, str]] = {
    "serve": ("penstock.commands.serve", "main", "start an OpenAI-compatible server on a model"),
    "route": ("penstock.commands.route", "main", "spread requests over several servers, by what their caches hold"),
    "chat": ("penstock.commands.chat", "main", "talk to a running server in the terminal"),
    "generate": ("penstock.commands.generate", "main", "complete prompts offline, without a server"),
    "bench": ("penstock.commands.families", "bench", "measure: serve, throughput, latency, kernels, startup"),
    "train": ("penstock.commands.families", "train", "train a small model: lm"),
    "convert": ("penstock.commands.convert", "main", "turn other formats into model directories: llama2c"),
    "quantize": ("penstock.commands.quantize", "main", "write a checkpoint with 8- or 4-bit weights"),
    "plan": ("penstock.commands.plan", "main", "show how a model would use this machine's memory"),
    "doctor": ("penstock.commands.doctor", "main", "check this machine and installation, a line each"),
    "demo": ("penstock.commands.demo", "main", "one whole round trip: start, chat, stream, stop"),
    "collect-env": ("penstock.commands.environment", "main", "print what a bug report needs"),
    "version": ("penstock.commands.environment", "version", "print the version"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. `argv` is sys.argv[1:] by default."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or debug_wanted()
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `penstock ... | head`
        sys.stderr.close()
        return 0
    except SystemExit as left:  # argparse of a room that brings its own parser
        return left.code if isinstance(left.code, int) else 1 if left.code else 0
    except Exception as error:
        if debug:
            raise
        return _report(error)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if arguments[:1] == ["help"] and len(arguments) > 1 and arguments[1] in VERBS:
            return _call(arguments[1], ["--help"])
        print(_help(), end="")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-V", "--version"):
        verb = "version"
    if verb not in VERBS:
        known = suggestion(verb, VERBS) or "; penstock --help lists them"
        raise ConfigError(f"penstock has no command {verb!r}{known}")
    return _call(verb, rest)


def _call(verb: str, arguments: list[str]) -> int:
    module, function, _ = VERBS[verb]
    bound_spinning()  # some verbs compute in this process
    return int(getattr(importlib.import_module(module), function)(arguments))


def _report(error: Exception) -> int:
    """One line on standard error, and the exit code it deserves."""
    text = str(error) or type(error).__name__
    if isinstance(error, ConfigError):
        print(f"penstock: {text}", file=sys.stderr)
        return 2
    ours = type(error).__module__.startswith("penstock.")  # a typed error of a room: its message is for people
    if ours or isinstance(error, (OSError, MemoryError)):
        print(f"penstock: {text}", file=sys.stderr)
        return 1
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("penstock"):
        print(f"penstock: the package {error.name} is missing; pip install {error.name}", file=sys.stderr)
        return 1
    name = type(error).__name__
    print(f"penstock: internal error, {name}: {text}; --debug shows where, please report it", file=sys.stderr)
    return 70


def _help() -> str:
    lines = [
        f"penstock {__version__}: an LLM inference engine and OpenAI-compatible server",
        "",
        "  penstock serve                 the built-in model at http://127.0.0.1:8000",
        "  penstock serve DIR             a checkpoint in Hugging Face layout",
        "  penstock chat                  talk to it",
        "",
        "commands:",
    ]
    lines += [f"  {verb:<12} {text}" for verb, (_, _, text) in VERBS.items()]
    lines += ["", "penstock COMMAND --help explains one; --debug shows tracebacks (or PENSTOCK_DEBUG=1)"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
