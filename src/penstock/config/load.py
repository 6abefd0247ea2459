"""From what the user gave to one frozen Config: flag > environment > file > model > auto > default, with origins.

`resolve` needs no model and no probe of the machine; config.complete fills in what depends on them. Knows the names
of built-in models. Does not know argparse (config.flags), nor what any setting does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from penstock.config.foreign import FOREIGN, ForeignFlag
from penstock.config.schema import SECTIONS, Config, Setting, settings
from penstock.config.values import ConfigError, format_value, parse_value, suggestion

BUILT_IN_MODELS = ("penstock-tiny",)
# Environment names that start with PENSTOCK_ and are no setting's twin.
OTHER_ENV = ("PENSTOCK_DEBUG", "PENSTOCK_SHARED", "PENSTOCK_CONFIG")


def resolve(
    given: Mapping[str, Any] | None = None,
    *,
    config_file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    foreign: Sequence[tuple[str, str]] = (),
) -> Config:
    """One Config from flags or keyword arguments (`given`: field name -> text or value), environment and file.

    foreign: (flag, value) pairs of other engines' flags, as config.flags collects them. `environ` is os.environ by
    default. Raises ConfigError; its message is one line for people.
    """
    environ = os.environ if environ is None else environ
    known = settings()
    values: dict[str, Any] = {name: item.default for name, item in known.items()}
    origins: dict[str, tuple[str, str]] = dict.fromkeys(known, ("default", ""))
    warnings: list[str] = []

    config_file = config_file or environ.get("PENSTOCK_CONFIG") or None
    if config_file is not None:
        for key, raw in read_config_file(config_file).items():
            name = str(key).removeprefix("--").replace("-", "_")
            where = f"{key} in {config_file}"
            if name in known:
                values[name] = parse_value(known[name], raw, where)
                origins[name] = ("file", str(config_file))
            else:
                _judge_foreign(name, raw, where, known, warnings)
    for name, item in known.items():
        for variable, suffix in {item.env: "", **item.extra.get("env", {})}.items():
            text = environ.get(variable, "")
            if text.strip():  # our own name comes first and hides the others
                lowered = text.lower() if name == "log_level" else text  # VLLM_LOGGING_LEVEL is written in capitals
                values[name] = parse_value(item, lowered + suffix, variable)
                origins[name] = ("env", variable)
                break
    warnings += _unknown_env(environ, known)
    for flag, text in foreign:
        _judge_foreign(flag.lstrip("-").replace("-", "_"), text, flag, known, warnings)
    for name, raw in (given or {}).items():
        if name in known:
            values[name] = parse_value(known[name], raw, known[name].flag)
            origins[name] = ("flag", known[name].flag)
        else:
            _judge_foreign(name, raw, "--" + name.replace("_", "-"), known, warnings)

    _settle_together(values, origins, warnings)
    parts = {
        section: cls(**{name: values[name] for name, item in known.items() if item.section == section})
        for section, cls in SECTIONS.items()
    }
    return Config(**parts, origins=origins, warnings=tuple(warnings))


def read_config_file(path: str | Path, flag: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; {} for an empty one. Raises ConfigError."""
    import yaml  # here, so that `penstock --help` does not pay for it

    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", flag) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {first}", flag) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold settings as `name: value` lines", flag)
    return data


def model_directory(name: str) -> Path:
    """The directory of a model: a built-in's name or a path. Raises ConfigError naming what would be right."""
    if name in BUILT_IN_MODELS:
        return Path(__file__).resolve().parent.parent / "assets" / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    built_in = ", ".join(BUILT_IN_MODELS)
    if path.is_file():
        if path.name == "config.json" or path.suffix == ".safetensors":
            raise ConfigError(f"{name} is a file; give its directory: {path.parent}", "--model")
        if path.suffix == ".bin":
            raise ConfigError(
                f"{name} is a file; if llama2.c wrote it: penstock convert llama2c {name} --tokenizer TOK.bin OUT_DIR",
                "--model",
            )
        raise ConfigError(f"{name} is a file; penstock reads directories in Hugging Face layout", "--model")
    near = suggestion(name, BUILT_IN_MODELS)
    if near:
        raise ConfigError(f"{name} is no directory and no built-in model{near}", "--model")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        local = name.split("/")[1]
        raise ConfigError(
            f"{name} is no directory here, and penstock downloads nothing; `hf download {name} --local-dir {local}`, "
            f"then give {local} (built in: {built_in})",
            "--model",
        )
    raise ConfigError(f"{name} does not exist (built in: {built_in})", "--model")


def foreign_flag(name: str) -> ForeignFlag | None:
    """Another engine's flag by its name without dashes in front, with underscores; None if it is not in the table."""
    for entry in FOREIGN:
        if name in (flag.lstrip("-").replace("-", "_") for flag in entry.flags):
            return entry
    return None


def _judge_foreign(name: str, raw: Any, where: str, known: Mapping[str, Setting], warnings: list[str]) -> None:
    """Another engine's setting, or a typing error. Raises ConfigError unless the value asks for nothing."""
    for item in known.values():
        if name in (alias.lstrip("-").replace("-", "_") for alias in item.extra.get("aliases", ())):
            raise ConfigError(f"use {item.name} here", where)
    entry = foreign_flag(name)
    if entry is None:
        words = [item.flag if where.startswith("-") else item.name for item in known.values()]
        words += [flag for other in FOREIGN for flag in other.flags] if where.startswith("-") else []
        near = suggestion(where if where.startswith("-") else name, words)
        raise ConfigError(f"unknown setting{near}", where)
    text = "" if raw is None or raw is True else str(raw).strip()
    if raw is False or (raw is None and "" not in entry.harmless):
        return
    if text not in entry.harmless:
        accepted = f" (accepted: {', '.join(entry.harmless)})" if entry.harmless and entry.harmless != ("",) else ""
        raise ConfigError(f"{entry.reason}{accepted}", where)
    if entry.warn:
        warnings.append(entry.warn.replace("{flag}", where))


def _unknown_env(environ: Mapping[str, str], known: Mapping[str, Setting]) -> list[str]:
    twins = [item.env for item in known.values()]
    return [
        f"{variable} is no setting of penstock{suggestion(variable, twins)}"
        for variable in sorted(environ)
        if variable.startswith("PENSTOCK_") and variable not in twins and variable not in OTHER_ENV
    ]


def _settle_together(values: dict[str, Any], origins: dict[str, tuple[str, str]], warnings: list[str]) -> None:
    """Rules that name more than one setting."""
    if bool(values["ssl_keyfile"]) != bool(values["ssl_certfile"]):
        missing = "--ssl-certfile" if values["ssl_keyfile"] else "--ssl-keyfile"
        raise ConfigError("TLS needs both a key and a certificate; this one is missing", missing)
    rows, budget = values["max_num_seqs"], values["max_num_batched_tokens"]
    if rows > budget:  # every running request needs at least one token per step
        if origins["max_num_seqs"][0] != "default":
            raise ConfigError(
                f"{rows} requests need at least as many tokens per step; --max-num-batched-tokens is {budget}",
                "--max-num-seqs",
            )
        values["max_num_seqs"] = budget
        origins["max_num_seqs"] = ("auto", "one token per request and step")
    if values["allow_credentials"] and "*" in values["allowed_origins"]:
        warnings.append("--allow-credentials: browsers refuse it for any origin; name yours with --allowed-origins")
    if not values["served_model_name"]:
        values["served_model_name"] = (values["model"].rstrip("/") or values["model"],)
        origins["served_model_name"] = ("auto", "the model as given")


def config_rows(config: Config) -> list[tuple[str, str, str]]:
    """(setting, value, origin) of every setting, in the order of the schema; secrets hidden."""
    rows = []
    for name, item in settings().items():
        origin, note = config.origins.get(name, ("default", ""))
        value = format_value(item, getattr(getattr(config, item.section), name))
        rows.append((name, value, f"{origin}: {note}" if note and origin != "flag" else origin))
    return rows


def print_config(config: Config, file: TextIO | None = None) -> None:
    """What is not at its default, with origins, then the warnings. `file` is standard output by default."""
    file = sys.stdout if file is None else file
    rows = [row for row in config_rows(config) if row[2] != "default"]
    wide = max((len(row[0]) for row in rows), default=0)
    wider = min(max((len(row[1]) for row in rows), default=0), 40)
    for name, value, origin in rows:
        print(f"  {name:<{wide}}  {value:<{wider}}  {origin}", file=file)
    rest = len(settings()) - len(rows)
    print(f"  {rest} other settings are at their defaults (--help=all shows them)", file=file)
    for line in config.warnings:
        print(f"  warning: {line}", file=file)


def debug_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """PENSTOCK_DEBUG is set: tracebacks instead of one line."""
    return (os.environ if environ is None else environ).get("PENSTOCK_DEBUG", "") not in ("", "0")


def first_api_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The key that a client should send: of PENSTOCK_API_KEY, else of VLLM_API_KEY, the first."""
    environ = os.environ if environ is None else environ
    for variable in ("PENSTOCK_API_KEY", "VLLM_API_KEY"):
        keys = parse_value(settings()["api_key"], environ.get(variable, ""), variable)
        if keys:
            return str(keys[0])
    return None
