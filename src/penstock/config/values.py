"""Values as people write them, made into values of a setting: "4GiB", "32k", "on", "a,b".

Knows one setting at a time. Does not know where a value came from, nor other settings.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from penstock.config.schema import Setting


class ConfigError(ValueError):
    """The user asked for something that cannot be. One line: which flag, what is wrong, what would be right."""

    def __init__(self, message: str, flag: str = "") -> None:
        super().__init__(f"{flag}: {message}" if flag else message)
        self.flag = flag
        self.problem = message


# vLLM's reading: 1k is 1000 and 1K is 1024. With a B the usual one: 1kB and 1MB are decimal, 1KiB and 1MiB binary.
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_NUMBER = re.compile(r"([+-]?[0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([kKmMgGtT]?)(i?)([bB]?)")
_PLAIN = re.compile(r"[0-9]+(\.[0-9]+)?")
_TRUE = frozenset(("1", "true", "yes", "on", "y", "t"))
_FALSE = frozenset(("0", "false", "no", "off", "n", "f"))


def parse_size(text: str) -> int:
    """ "512M" -> 536870912, "4GiB", "4G", "1.5k" -> 1500. Raises ValueError for anything else, fractions included."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, prefix, binary, byte = match.groups()
    if prefix:
        decimal = (prefix.islower() or byte) and not binary
        scale = (1000 if decimal else 1024) ** _POWERS[prefix.lower()]
    else:
        scale = 1
        if binary:
            raise ValueError(text)
    value = float(number) * scale if "." in number or "e" in number.lower() else int(number) * scale
    if not math.isfinite(value) or value != int(value):
        raise ValueError(text)
    return int(value)


def parse_value(setting: Setting, raw: Any, flag: str) -> Any:
    """`raw` (text, or a value from YAML or Python) as this setting's type, range checked.

    `flag` names the origin in errors: "--port", "PENSTOCK_PORT", "port in serve.yaml". Raises ConfigError.
    """
    if isinstance(raw, str) and setting.extra.get("auto") and raw.strip().lower() in ("auto", "-1"):
        return None
    if setting.extra.get("auto") and raw == -1:
        return None
    if raw is None or (isinstance(raw, str) and setting.optional and raw.strip().lower() in ("none", "null")):
        if setting.optional or raw is None:
            return None if setting.optional else setting.default
    value = _convert(setting, raw, flag)
    _check_range(setting, value, flag)
    return value


def _convert(setting: Setting, raw: Any, flag: str) -> Any:
    try:
        if setting.kind == "bool":
            return _parse_bool(raw)
        if setting.kind == "int":
            if "plain" in setting.extra and not isinstance(raw, bool) and _PLAIN.fullmatch(str(raw).strip()):
                raw = f"{raw}{setting.extra['plain']}"
            if isinstance(raw, str):
                return parse_size(raw)
            if isinstance(raw, bool) or int(raw) != raw:
                raise ValueError(raw)
            return int(raw)
        if setting.kind == "float":
            if isinstance(raw, bool):
                raise ValueError(raw)
            value = float(raw)
            if not math.isfinite(value):
                raise ValueError(raw)
            return value
        if setting.kind == "list":
            return _parse_list(raw)
        if isinstance(raw, dict) and setting.extra.get("mapping"):
            return json.dumps(raw)
        if not isinstance(raw, (str, int, float)):
            raise ValueError(raw)
        if isinstance(raw, bool) and "switch" in setting.extra:
            on, off = setting.extra["switch"]
            return on if raw else off
        return setting.extra.get("synonyms", {}).get(str(raw), str(raw))
    except (ValueError, TypeError, OverflowError):
        shown = "the value given" if setting.extra.get("secret") else repr(raw)
        raise ConfigError(f"{shown} is not {_wanted(setting)}", flag) from None


def _parse_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(raw)


def _parse_list(raw: Any) -> tuple[str, ...]:
    """A JSON list, a comma-separated text, or a list whose items are such."""
    if isinstance(raw, str):
        if raw.lstrip().startswith("["):
            raw = json.loads(raw)
            if not all(isinstance(item, str) for item in raw):
                raise ValueError(raw)
            return tuple(raw)
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    if isinstance(raw, (list, tuple)):
        return tuple(part for item in raw for part in _parse_list(item))
    raise ValueError(raw)


def _check_range(setting: Setting, value: Any, flag: str) -> None:
    extra = setting.extra
    choices = extra.get("choices")
    if choices and value not in choices:
        close = suggestion(str(value), choices)
        raise ConfigError(f"{value!r} is not {_wanted(setting)}{close}", flag)
    if setting.kind not in ("int", "float"):
        return
    too_low = ("low" in extra and value < extra["low"]) or ("above" in extra and value <= extra["above"])
    if too_low or ("high" in extra and value > extra["high"]):
        raise ConfigError(f"{value} is not {_wanted(setting)}", flag)


def _wanted(setting: Setting) -> str:
    """What would have been right, in words."""
    extra = setting.extra
    if "choices" in extra:
        return "one of " + ", ".join(extra["choices"])
    if setting.kind == "bool":
        return "true or false"
    if setting.kind == "list":
        return "a list of texts"
    if setting.kind == "str":
        return "a text"
    words = {"bytes": "a size such as 512M or 4GiB", "tokens": "a number of tokens", "s": "a number of seconds"}
    text = words.get(extra.get("unit", ""), "a whole number" if setting.kind == "int" else "a number")
    if "above" in extra:
        text += f" above {extra['above']:g}"
    if "low" in extra and "high" in extra:
        text += f" from {extra['low']} to {extra['high']}"
    elif "low" in extra:
        text += f", at least {extra['low']:g}"
    elif "high" in extra:
        text += f", at most {extra['high']:g}"
    if extra.get("auto"):
        text += ', or "auto"'
    return text


def suggestion(word: str, known: Iterable[str]) -> str:
    """ "; did you mean --max-num-seqs?" for the nearest known word, or "" when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def format_value(setting: Setting, value: Any) -> str:
    """For tables: sizes with units, secrets hidden, lists joined."""
    if setting.extra.get("secret"):
        return f"({len(value)} hidden)" if value else "none"
    if value is None:
        return "auto" if setting.extra.get("auto") else "none"
    if setting.kind == "bool":
        return "yes" if value else "no"
    if setting.kind == "list":
        return ", ".join(value) if value else "none"
    if setting.extra.get("unit") == "bytes":
        return format_bytes(value)
    if setting.kind == "float":
        return f"{value:g}"
    return str(value) if value != "" else '""'


def format_bytes(num_bytes: float) -> str:
    """1536 -> "1.5 KiB". Binary units, at most one decimal."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}".replace(".0 ", " ")
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB".replace(".0 ", " ")
