"""What `penstock route` is told beside the settings of its HTTP side: engines, roles, where they publish events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from penstock.config.values import ConfigError, suggestion

KEYS = ("events", "replay", "topic")


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """One server. `name`: host and port, as told to people. `events`, `replay`: its PUB and ROUTER sockets."""

    name: str
    url: str
    role: str  # prefill, decode or both
    events: str = ""
    replay: str = ""
    topic: str = ""


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """All that a router must know of the world behind it."""

    engines: tuple[EngineAddress, ...]
    engine_api_key: str | None = None  # None: the client's own goes on to the engine
    health_interval_s: float = 1.0
    approximate_ttl_s: float = 120.0
    block_size: int | None = None


def engine_addresses(
    both: Sequence[str], prefill: Sequence[str] = (), decode: Sequence[str] = ()
) -> tuple[EngineAddress, ...]:
    """Of the flags --engine, --prefill and --decode. Raises ConfigError."""
    if both and (prefill or decode):
        raise ConfigError("engines for one phase or for both, not some of each", "--engine with --prefill or --decode")
    if bool(prefill) != bool(decode):
        missing = "--decode" if prefill else "--prefill"
        raise ConfigError("engines for one phase need some for the other; this one is missing", missing)
    if not (both or prefill):
        raise ConfigError("name at least one server: --engine http://host:8000", "penstock route")
    found = [
        _address(text, role, flag)
        for texts, role, flag in (
            (both, "both", "--engine"),
            (prefill, "prefill", "--prefill"),
            (decode, "decode", "--decode"),
        )
        for text in texts
    ]
    names = [each.name for each in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"{double} is named twice", "--engine")
    return tuple(found)


def _address(text: str, role: str, flag: str) -> EngineAddress:
    url, *rest = text.split(",")
    url = url if "://" in url else f"http://{url}"
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"{url} has no valid port", flag) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url} is not an address such as http://127.0.0.1:8000", flag)
    extra: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if key not in KEYS or not equals:
            raise ConfigError(f"{part!r} is none of {', '.join(f'{k}=...' for k in KEYS)}{suggestion(key, KEYS)}", flag)
        if key != "topic" and not value.startswith(("tcp://", "ipc://")):
            raise ConfigError(f"{key}={value} is no address such as tcp://127.0.0.1:5557", flag)
        extra[key] = value
    if "events" not in extra and extra:
        raise ConfigError("replay and topic say something about events=tcp://..., which is missing", flag)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    name = f"{host}:{port or (443 if parts.scheme == 'https' else 80)}{parts.path.rstrip('/').removesuffix('/v1')}"
    return EngineAddress(name, url, role, **extra)
