"""Which packages penstock needs and which are here, from installed metadata. Imports none of them."""

from __future__ import annotations

import re
from importlib import metadata


def required() -> list[tuple[str, str, str | None]]:
    """(name, wanted versions, installed version or None) of every base dependency."""
    try:
        lines = metadata.requires("penstock") or []
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return []
    found = []
    for line in lines:
        if "extra ==" in line:
            continue
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*([^;]*)", line)
        if match:
            found.append((match.group(1), match.group(2).strip(), installed(match.group(1))))
    return found


def installed(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is within `>=a.b,<c`; only these comparisons, and only numbers, are looked at."""
    for part in filter(None, wanted.split(",")):
        match = re.match(r"(>=|<)\s*([0-9.]+)", part.strip())
        if match:
            have, bound = _numbers(version), _numbers(match.group(2))
            if (match.group(1) == ">=" and have < bound) or (match.group(1) == "<" and have >= bound):
                return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"[0-9]+", version.split("+")[0])[:3])
