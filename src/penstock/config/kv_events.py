"""vLLM's `--kv-events-config`: where an engine publishes what its cache holds. Knows the JSON; opens no socket."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from penstock.config.values import ConfigError, suggestion

FLAG = "--kv-events-config"


@dataclass(frozen=True, slots=True)
class EventSettings:
    """Names and defaults are vLLM's; vLLM's `max_queue_size` is accepted and means nothing: there is no queue."""

    enable_kv_cache_events: bool = False
    publisher: str = ""  # "zmq" or "null"; "": zmq where events are enabled
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000  # batches kept for replay
    hwm: int = 100_000  # messages kept for a subscriber that does not read
    max_queue_size: int = 100_000
    topic: str = ""

    @property
    def is_on(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"


def event_settings(text: str | None) -> EventSettings | None:
    """What the flag says; None where nothing is to be published. Raises ConfigError."""
    if text is None:
        return None
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}", FLAG) from None
    if not isinstance(given, dict):
        raise ConfigError("an object is expected", FLAG)
    known = {item.name: item for item in fields(EventSettings)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"unknown key {name!r}{suggestion(str(name), known)}", FLAG)
        default = known[name].default
        kind = str if default is None else type(default)
        if value is None and name in ("replay_endpoint", "publisher"):
            continue
        if type(value) is not kind:
            raise ConfigError(f"{name}: {value!r} is no {kind.__name__}", FLAG)
    found = EventSettings(**{name: value for name, value in given.items() if value is not None})
    if found.publisher not in ("", "zmq", "null"):
        raise ConfigError(f"publisher {found.publisher!r} is neither zmq nor null", FLAG)
    for address in (found.endpoint, found.replay_endpoint):
        if address is not None and not address.startswith(("tcp://", "ipc://", "inproc://")):
            raise ConfigError(f"{address!r} is no address such as tcp://*:5557", FLAG)
    if found.buffer_steps < 1 or found.hwm < 0:
        raise ConfigError("buffer_steps must be at least 1, hwm at least 0", FLAG)
    return found if found.is_on else None
