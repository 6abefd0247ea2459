"""Several engines of one machine behind one server: who gets which processors and how much memory. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from penstock.build.launch import EngineProcess, PoolProcess
from penstock.build.start import import_server
from penstock.cluster.seat import Seat, chosen_link
from penstock.config.complete import Resolved, complete
from penstock.config.hardware import Machine, probe
from penstock.config.memory import MemoryPlanError
from penstock.config.roles import RoleGroup, role_groups
from penstock.config.schema import Config
from penstock.config.socket_directory import SocketDirectory
from penstock.engine.messages import Ready
from penstock.server.port import listening_socket

log = logging.getLogger("penstock.server")


def serve_cluster(
    config: Config,
    *,
    on_ready: Callable[[Ready, str], None] | None = None,
    on_resolved: Callable[[Resolved], None] | None = None,
) -> int:
    """As `build.serve.serve`, for a configuration with `pd`."""
    groups = role_groups(config.cluster)
    machine = probe()
    each = complete_groups(config, groups, machine)
    resolved, roles = each[0], {name: group.role for group in groups for name in group.names}
    with listening_socket(config.server) as sock, contextlib.closing(SocketDirectory()) as directory:
        if on_resolved is not None:
            on_resolved(resolved)
        pool = None if config.cache.kv_offloading_size is None else PoolProcess(resolved.config, directory.path)
        for group in groups:
            if group.settings:
                log.info("%s: %s", group.role, ", ".join(f"{name} {value}" for name, value in group.settings.items()))
        by_name = {name: done for group, done in zip(groups, each, strict=True) for name in group.names}
        fleet = _Fleet(by_name, make_seats(by_name, roles, directory.path))
        try:
            return int(import_server().run_cluster(resolved, roles, fleet.launch, sock, on_ready))
        finally:
            fleet.kill()
            if pool is not None:
                pool.close()


class _Fleet:
    """The engines' processes. The first of each starts at once, so that it loads while others import what they need."""

    def __init__(self, resolved: Mapping[str, Resolved], seats: Sequence[Seat]) -> None:
        self._resolved = resolved
        self._seats = {seat.name: seat for seat in seats}
        self._early = {name: EngineProcess(resolved[name], seat) for name, seat in self._seats.items()}
        self._processes = dict(self._early)  # the last of each name

    def launch(self, name: str, address: str) -> EngineProcess:
        """A process of this name that dials `address`."""
        process = self._early.pop(name, None)
        if process is None:
            process = EngineProcess(self._resolved[name], self._seats[name])
        self._processes[name] = process
        process.dial(address)
        return process

    def kill(self) -> None:
        """Those that still run."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()


def complete_groups(config: Config, groups: Sequence[RoleGroup], machine: Machine) -> list[Resolved]:
    """Each group's configuration, for one of its engines. All take prompts of the same length: what the tightest takes.

    Raises ConfigError, MemoryPlanError.
    """
    share = share_of(machine, sum(len(group.names) for group in groups))

    def done(group: RoleGroup, config: Config) -> Resolved:
        try:
            return complete(group.apply(config), share)
        except MemoryPlanError as error:
            alike = [group] if any(other.settings for other in groups) else groups
            names = ", ".join(name for other in alike for name in other.names)
            raise MemoryPlanError(f"{names}: each has to do with its share of the memory: {error}") from None

    each = [done(group, config) for group in groups]
    lengths = [resolved.memory.max_model_len for resolved in each]
    if len(set(lengths)) > 1:
        shorter = replace(config, model=replace(config.model, max_model_len=min(lengths)))
        each = [done(group, shorter) for group in groups]
    return each


def share_of(machine: Machine, num_engines: int) -> Machine:
    """What one of so many equal engines may use."""
    num_cores = max(1, machine.num_cores // num_engines)
    return replace(
        machine,
        num_cores=num_cores,
        cores_note=f"{machine.cores_note}, shared by {num_engines} engines",
        memory_free_bytes=machine.memory_free_bytes // num_engines,
        memory_note=f"{machine.memory_note}, shared by {num_engines} engines",
    )


def make_seats(resolved: Mapping[str, Resolved], roles: Mapping[str, str], directory: str) -> list[Seat]:
    """One for each engine. Processors are dealt out by numbers of threads, while there is one for each engine."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = deal_cores(cores, [resolved[name].config.runtime.num_threads or 1 for name in roles])
    options = next(iter(resolved.values())).config.cluster
    secret = options.cluster_secret or secrets.token_hex(32)
    return [
        Seat(
            name=name,
            role=role,
            directory=directory,
            secret=secret,
            link=chosen_link(options.kv_link),
            link_mode=options.kv_link_mode,
            cores=share,
            lease_s=options.kv_lease_s,
            min_tokens=options.pd_min_tokens,
        )
        for (name, role), share in zip(roles.items(), shares, strict=True)
    ]


def deal_cores(cores: Sequence[int], num_threads: Sequence[int]) -> list[tuple[int, ...]]:
    """Each engine's own cores, in proportion to its threads; none for anybody where somebody would have none."""
    total, begin, shares = sum(num_threads), 0, []
    for number in num_threads:
        end = begin + len(cores) * number // total
        shares.append(tuple(cores[begin:end]))
        begin = end
    return shares if all(shares) else [()] * len(num_threads)
