"""Several engines of one machine behind one server: who gets which processors and how much memory. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

from penstock.build.launch import EngineProcess, PoolProcess
from penstock.build.start import import_server
from penstock.cluster.seat import Seat, parse_roles
from penstock.config.complete import Resolved, complete
from penstock.config.hardware import Machine, probe
from penstock.config.schema import Config
from penstock.engine.messages import Ready
from penstock.server.port import listening_socket


def serve_cluster(
    config: Config,
    *,
    on_ready: Callable[[Ready, str], None] | None = None,
    on_resolved: Callable[[Resolved], None] | None = None,
) -> int:
    """As `build.serve.serve`, for a configuration with `pd`."""
    assert config.cluster.pd is not None
    roles = parse_roles(config.cluster.pd)
    machine = probe()
    resolved = complete(config, share_of(machine, len(roles)))
    with listening_socket(config.server) as sock, _directory() as directory:
        if on_resolved is not None:
            on_resolved(resolved)
        pool = None if config.cache.kv_offloading_size is None else PoolProcess(resolved.config.cache, directory)
        seats = make_seats(config, roles, directory)
        processes = {seat.name: EngineProcess(resolved, seat) for seat in seats}
        try:
            return int(import_server().run_cluster(resolved, roles, processes, sock, on_ready))
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
            if pool is not None:
                pool.close()


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
    link = "shm" if config.cluster.kv_link == "auto" else config.cluster.kv_link
    secret = config.cluster.cluster_secret or secrets.token_hex(32)
    return [
        Seat(
            name=name,
            role=role,
            directory=directory,
            secret=secret,
            link=link,
            link_mode=config.cluster.kv_link_mode,
            cores=tuple(cores[n * each : (n + 1) * each]),
            lease_s=config.cluster.kv_lease_s,
            min_tokens=config.cluster.pd_min_tokens,
        )
        for n, (name, role) in enumerate(roles.items())
    ]


@contextlib.contextmanager
def _directory() -> Iterator[str]:
    """For socket files: short names, for they may have 107 characters."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the KV arena is a file there
    directory = tempfile.mkdtemp(prefix="penstock-", dir=memory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
