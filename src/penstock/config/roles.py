"""Which engines a server has on its machine, and what each role is set to: what `--pd` says. Starts nothing.

`1P1D`, or for each role a number of engines or a mapping of settings, as JSON or in a YAML file:

    prefill: {engines: 2, max_num_batched_tokens: 8192, num_threads: 4}
    decode: {engines: 1, max_num_seqs: 512, kv_cache_memory_bytes: 16G}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from penstock.config.load import read_config_file
from penstock.config.schema import ClusterOptions, Config, settings
from penstock.config.values import ConfigError, parse_value, suggestion

FLAG = "--pd"
ROLES = ("prefill", "decode")
MAX_ENGINES = 64
# What engines that hand prompts to each other may differ in. The model, its data types and the blocks' size are one.
PER_ROLE = (
    "num_threads", "kv_cache_memory_bytes", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens",
    "scheduling_policy", "max_queue_wait_s", "async_scheduling",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RoleGroup:
    """Engines of one role, all alike. `settings`: parsed values by name, of `PER_ROLE`."""

    role: str  # prefill, decode or both
    names: tuple[str, ...]
    settings: Mapping[str, Any]

    def apply(self, config: Config) -> Config:
        """The configuration of these engines. Raises ConfigError where it does not fit together."""
        origins = dict(config.origins)
        parts: dict[str, Any] = {}
        for name, value in self.settings.items():
            section = settings()[name].section
            parts[section] = replace(parts.get(section, getattr(config, section)), **{name: value})
            origins[name] = ("flag", f"{FLAG}: {self.role}")
        done = replace(config, **parts, origins=origins)
        rows, budget = done.scheduler.max_num_seqs, done.scheduler.max_num_batched_tokens
        if rows <= budget:
            return done
        if origins["max_num_seqs"][0] in ("flag", "env", "file"):
            message = f"{rows} requests need at least as many tokens per step; max_num_batched_tokens is {budget}"
            raise ConfigError(message, f"{FLAG}: {self.role}: max_num_seqs")
        origins["max_num_seqs"] = ("auto", "one token per request and step")
        return replace(done, scheduler=replace(done.scheduler, max_num_seqs=budget), origins=origins)


def role_groups(options: ClusterOptions) -> list[RoleGroup]:
    """At least one, each of at least one engine. Raises ConfigError."""
    if options.pd is None:
        return [RoleGroup("both", tuple(f"engine-{n}" for n in range(options.data_parallel_size)), {})]
    if options.data_parallel_size > 1:
        raise ConfigError("engines for one phase or for both, not some of each", f"{FLAG} and --data-parallel-size")
    return parse_roles(options.pd)


def parse_roles(text: str) -> list[RoleGroup]:
    """Of "1P1D", "2p2d", a JSON object or the name of a YAML file; prefill first. Raises ConfigError."""
    text = text.strip()
    if text.endswith((".yaml", ".yml", ".json")):
        return _from_mapping(read_config_file(text, FLAG), f"{FLAG} {text}")
    if text.startswith("{"):
        try:
            return _from_mapping(json.loads(text), FLAG)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"not JSON: {error}", FLAG) from None
    prefill, p, rest = text.upper().partition("P")
    decode, d, end = rest.partition("D")
    if not (p and d and not end and prefill.isdecimal() and decode.isdecimal()):
        raise ConfigError(f"{text!r} is not of the form 1P1D, and no .yaml file", FLAG)
    flag = f"{FLAG} {text}"
    return [_group("prefill", int(prefill), {}, flag), _group("decode", int(decode), {}, flag)]


def _from_mapping(given: Mapping[str, Any], flag: str) -> list[RoleGroup]:
    for role in given:
        if role not in ROLES:
            raise ConfigError(f"{role!r} is no role{suggestion(str(role), ROLES)}; roles: {', '.join(ROLES)}", flag)
    groups = []
    for role in ROLES:
        wanted = given.get(role)
        if isinstance(wanted, Mapping):
            wanted = dict(wanted)
            number = wanted.pop("engines", 1)
        else:
            number, wanted = wanted, {}
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(f"{role}: a number of engines, or a mapping of settings, is expected", flag)
        groups.append(_group(role, number, wanted, flag))
    return groups


def _group(role: str, number: int, given: Mapping[str, Any], flag: str) -> RoleGroup:
    if not 1 <= number <= MAX_ENGINES:
        raise ConfigError(f"{role}: between 1 and {MAX_ENGINES} engines, not {number}", flag)
    known, values = settings(), {}
    for key, raw in given.items():
        name = str(key).removeprefix("--").replace("-", "_")
        if name not in PER_ROLE:
            near = suggestion(name, ("engines", *PER_ROLE))
            reason = "is the same for all engines" if name in known else "is unknown"
            raise ConfigError(f"{role}: {key!r} {reason}{near}; a role may set: {', '.join(PER_ROLE)}", flag)
        values[name] = parse_value(known[name], raw, f"{flag}: {role}: {name}")
    return RoleGroup(role, tuple(f"{role}-{n}" for n in range(number)), values)
