"""What verbs share: a parser for model settings with help topics, and settings out of what it parsed.

Knows flags and configuration. Does not know what a verb does with them.
"""

from __future__ import annotations

import argparse
from typing import Any

from penstock.config.flags import FlagParser, HelpRequested, given_settings
from penstock.config.load import resolve
from penstock.config.schema import Config, settings
from penstock.config.values import ConfigError


def parse_or_help(parser: FlagParser, arguments: list[str]) -> argparse.Namespace | None:
    """The parsed arguments; None after help was printed because it was asked for. Raises ConfigError."""
    try:
        return parser.parse(arguments)
    except HelpRequested as wanted:
        print(parser.help_text(wanted.topic), end="")
        return None


def add_model(parser: FlagParser) -> None:
    """The positional MODEL that stands beside --model."""
    parser.add_argument(
        "positional_model", nargs="?", metavar="MODEL", help="model directory or built-in model [penstock-tiny]"
    )


def settings_from(parsed: argparse.Namespace) -> dict[str, Any]:
    """Settings given as flags; MODEL and --model may not disagree."""
    given = given_settings(parsed)
    model = parsed.positional_model
    if model is not None:
        if given.get("model", model) != model:
            raise ConfigError(f"two models were given: {model} and {given['model']}")
        given["model"] = model
    return given


def config_from(parsed: argparse.Namespace) -> Config:
    """Flags, environment and file as one Config. Raises ConfigError."""
    foreign = getattr(parsed, "foreign", ())
    return resolve(settings_from(parsed), config_file=parsed.config_file, foreign=foreign)


def keyword_settings(config: Config) -> dict[str, Any]:
    """What the user set in any way, as keyword arguments for `LLM(...)`."""
    return {
        name: getattr(getattr(config, item.section), name)
        for name, item in settings().items()
        if config.origins[name][0] in ("file", "env", "flag")
    }
