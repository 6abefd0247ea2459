"""Several engines of one machine behind one server: who gets which processors and how much memory. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from penstock.build.launch import EngineProcess, PoolProcess
from penstock.build.start import import_server
from penstock.cluster.seat import Seat, chosen_link, make_roles
from penstock.config.complete import Resolved, complete
from penstock.config.hardware import Machine, probe
from penstock.config.memory import MemoryPlanError
from penstock.config.schema import Config
from penstock.config.socket_directory import SocketDirectory
from penstock.engine.messages import Ready
from penstock.server.port import listening_socket


def serve_cluster(
    config: Config,
    *,
    on_ready: Callable[[Ready, str], None] | None = None,
    on_resolved: Callable[[Resolved], None] | None = None,
) -> int:
    """As `build.serve.serve`, for a configuration with `pd`."""
    roles = make_roles(config.cluster.pd, config.cluster.data_parallel_size)
    machine = probe()
    try:
        resolved = complete(config, share_of(machine, len(roles)))
    except MemoryPlanError as error:
        raise MemoryPlanError(f"{', '.join(roles)}: each has to do with its share of the memory: {error}") from None
    with listening_socket(config.server) as sock, contextlib.closing(SocketDirectory()) as directory:
        if on_resolved is not None:
            on_resolved(resolved)
        pool = None
        if config.cache.kv_offloading_size is not None:
            pool = PoolProcess(resolved.config.cache, directory.path, config.runtime.log_level)
        fleet = _Fleet(resolved, make_seats(config, roles, directory.path))
        try:
            return int(import_server().run_cluster(resolved, roles, fleet.launch, sock, on_ready))
        finally:
            fleet.kill()
            if pool is not None:
                pool.close()


class _Fleet:
    """The engines' processes. The first of each starts at once, so that it loads while others import what they need."""

    def __init__(self, resolved: Resolved, seats: Sequence[Seat]) -> None:
        self._resolved = resolved
        self._seats = {seat.name: seat for seat in seats}
        self._early = {name: EngineProcess(resolved, seat) for name, seat in self._seats.items()}
        self._processes = dict(self._early)  # the last of each name

    def launch(self, name: str, address: str) -> EngineProcess:
        """A process of this name that dials `address`."""
        process = self._early.pop(name, None) or EngineProcess(self._resolved, self._seats[name])
        self._processes[name] = process
        process.dial(address)
        return process

    def kill(self) -> None:
        """Those that still run."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()


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


def make_seats(config: Config, roles: dict[str, str], directory: str) -> list[Seat]:
    """One for each engine. Processors are dealt out while there is one for each."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(cores) // len(roles)
    secret = config.cluster.cluster_secret or secrets.token_hex(32)
    return [
        Seat(
            name=name,
            role=role,
            directory=directory,
            secret=secret,
            link=chosen_link(config.cluster.kv_link),
            link_mode=config.cluster.kv_link_mode,
            cores=tuple(cores[n * each : (n + 1) * each]),
            lease_s=config.cluster.kv_lease_s,
            min_tokens=config.cluster.pd_min_tokens,
        )
        for n, (name, role) in enumerate(roles.items())
    ]
