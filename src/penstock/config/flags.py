"""Command-line flags and help, generated from the schema: vLLM's names, SGLang's aliases, dashes or underscores.

Flags are only collected here, as text; config.load gives them their types, so that a wrong value reads the same
whichever way it came. Does not know verbs, nor what a setting does.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from penstock.config.foreign import FOREIGN
from penstock.config.schema import SECTIONS, Setting, settings
from penstock.config.values import ConfigError, format_value, suggestion


class HelpRequested(Exception):
    """`--help` was given; `topic` is "", "all" or a word to search for."""

    def __init__(self, topic: str) -> None:
        super().__init__(topic)
        self.topic = topic


class FlagParser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors with a near-miss suggestion, and whose help has topics.

    `sections` of the schema become flags. After `parse`, `given_settings(namespace)` has what the user gave.
    """

    def __init__(self, *, sections: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, **options)
        self.add_argument("-h", "--help", nargs="?", const="", metavar="all|WORD", action=_Help, help=argparse.SUPPRESS)
        self.items = settings(sections) if sections else {}
        for item in self.items.values():
            _add_setting(self, item)
        if sections:
            self.add_argument(
                "--config", dest="config_file", metavar="FILE", default=None, help="settings from a YAML file"
            )
            for entry in FOREIGN:
                for flag in entry.flags:
                    bare = "" in entry.harmless
                    self.add_argument(flag, action=_Foreign, nargs=0 if bare else "?", const="", help=argparse.SUPPRESS)

    def take(self, *names: str) -> None:
        """Settings of other sections, by name."""
        known = settings()
        for name in names:
            self.items[name] = known[name]
            _add_setting(self, known[name])

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """As `parse_args`, after making `--max_num_seqs` into `--max-num-seqs`. Raises ConfigError, HelpRequested."""
        found, rest = self.parse_known_args(self._normalise(args))
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = rest[0].partition("=")[0]
            if word.startswith("-"):
                raise ConfigError(f"unknown flag {word}{suggestion(word, flags)}")
            raise ConfigError(f"unexpected argument {word!r}")
        return found

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):  # "argument --port: expected one argument"
            flag, _, rest = message.removeprefix("argument ").partition(": ")
            raise ConfigError(rest, flag.split("/")[0])
        raise ConfigError(message)

    def _normalise(self, args: Sequence[str]) -> list[str]:
        """Dashes for underscores in flag names; `--async-scheduling` without a value gets the one it stands for."""
        switches = {item.flag: item for item in self.items.values() if "switch" in item.extra}
        result: list[str] = []
        for index, arg in enumerate(args):
            if arg == "--":
                return result + list(args[index:])
            if arg.startswith("--"):
                name, equals, value = arg.partition("=")
                arg = name.replace("_", "-") + equals + value
                if arg in switches:
                    following = args[index + 1] if index + 1 < len(args) else ""
                    if following not in switches[arg].extra["choices"]:
                        arg = f"{arg}={switches[arg].extra['switch'][0]}"
            result.append(arg)
        return result

    def help_text(self, topic: str = "") -> str:
        """The verb's own arguments, then settings: the headline ones, all, or those that contain `topic`."""
        if topic not in ("", "all"):
            return self._search(topic)
        parts = [self.format_help().rstrip()]
        sections = dict.fromkeys(item.section for item in self.items.values())
        for section in sections:
            shown = [i for i in self.items.values() if i.section == section and (topic or i.extra.get("headline"))]
            if shown:
                title = (SECTIONS[section].__doc__ or section).split("\n")[0].rstrip(".")
                parts.append(title + ":\n" + "\n".join(_describe(item) for item in shown))
        if self.items:
            hidden = sum(1 for item in self.items.values() if not item.extra.get("headline"))
            more = f"{hidden} more: --help=all; by word: --help=cache. " if not topic else ""
            parts.append(
                f"{more}Every flag is also a key of the YAML file (--config) and an environment variable "
                "(--max-num-seqs: PENSTOCK_MAX_NUM_SEQS)."
            )
        return "\n\n".join(parts) + "\n"

    def _search(self, word: str) -> str:
        word = word.lower()
        hits = [
            item
            for item in self.items.values()
            if word in " ".join((item.flag, item.name, item.help, *item.extra.get("aliases", ()))).lower()
        ]
        later = [
            f"  {flag}\n      {entry.reason if not entry.warn else 'accepted'}"
            for entry in FOREIGN
            for flag in entry.flags
            if self.items and word in flag
        ]
        own = [
            f"  {', '.join(action.option_strings) or action.dest}\n      {action.help}"
            for action in self._actions
            if action.help not in (None, argparse.SUPPRESS)
            and word in f"{' '.join(action.option_strings)} {action.dest} {action.help}".lower()
        ]
        if not (hits or later or own):
            return f"no flag of {self.prog} has to do with {word!r}; --help=all shows every one\n"
        parts = own + [_describe(item) for item in hits] + later
        return f"flags of {self.prog} with {word!r}:\n" + "\n".join(parts) + "\n"


def given_settings(namespace: argparse.Namespace) -> dict[str, Any]:
    """What the user gave on the command line: field name -> raw value, for `config.load.resolve`."""
    known = settings()
    return {name: value for name, value in vars(namespace).items() if name in known}


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise HelpRequested(values or "")


class _Foreign(argparse.Action):
    """Collects (flag, value); whether it is refused is decided in one place, for flags and files alike."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, "foreign", default=(), **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        text = values if isinstance(values, str) else ""
        namespace.foreign = (*namespace.foreign, (option_string or "", text))


def _add_setting(parser: argparse.ArgumentParser, item: Setting) -> None:
    names = (item.flag, *item.extra.get("aliases", ()))
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if item.kind == "bool":
        parser.add_argument(*names, action="store_const", const=True, **options)
        off = [f"--no-{name[2:]}" for name in names] + list(item.extra.get("off", ()))
        parser.add_argument(*off, action="store_const", const=False, **options)
    elif item.kind == "list":
        parser.add_argument(*names, nargs="+", action="extend", **options)
    else:
        parser.add_argument(*names, **options)
        if "switch" in item.extra:
            parser.add_argument(f"--no-{item.flag[2:]}", action="store_const", const=item.extra["switch"][1], **options)


def _describe(item: Setting) -> str:
    """Two or three lines of help for one setting."""
    flag = f"  {item.flag}" if item.kind == "bool" else f"  {item.flag} {item.metavar}"
    if item.kind == "bool":
        flag += f", --no-{item.flag[2:]}"
    if item.kind == "list":
        flag += " ..."
    if aliases := item.extra.get("aliases"):
        flag += f"   (also {', '.join(aliases)})"
    default = format_value(item, item.default)
    text = item.help if item.optional and "default" in item.help else f"{item.help} [{default}]"
    return flag + "\n" + textwrap.fill(text, 100, initial_indent="      ", subsequent_indent="      ")
