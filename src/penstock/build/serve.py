"""The server of one machine: the HTTP front end in this process, the engine in its own. Imports no torch.

The engine is launched first, so that it loads while this process imports what a web server needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from penstock.build.cluster import serve_cluster
from penstock.build.launch import EngineProcess, PoolProcess
from penstock.build.start import import_server
from penstock.cluster.seat import Seat, chosen_link
from penstock.config.cluster import check_cluster
from penstock.config.complete import Resolved, complete
from penstock.config.fingerprint import model_fingerprint
from penstock.config.hardware import probe
from penstock.config.schema import Config
from penstock.config.socket_directory import SocketDirectory
from penstock.engine.messages import Ready
from penstock.server.port import listening_socket


def seat_of(resolved: Resolved) -> Seat | None:
    """The place of a server's only engine among those of other servers. Raises OSError, ConfigError."""
    options, model = resolved.config.cluster, resolved.config.model
    if options.kv_role is None:
        return None
    assert options.cluster_secret is not None
    return Seat(
        name="engine" if options.kv_role == "both" else options.kv_role,
        role=options.kv_role,
        directory="",
        secret=options.cluster_secret,
        link=chosen_link(options.kv_link, auto="tcp"),
        link_mode=options.kv_link_mode,
        lease_s=options.kv_lease_s,
        min_tokens=options.pd_min_tokens,
        host=options.cluster_host,
        model=model_fingerprint(resolved.directory, model.dtype, model.quantization, model.load_format, model.seed),
    )


def serve(
    config: Config,
    *,
    on_ready: Callable[[Ready, str], None] | None = None,
    on_resolved: Callable[[Resolved], None] | None = None,
) -> int:
    """Serve until a signal; the exit code. `on_resolved` sees the completed configuration once the port is ours and
    before anything loads.

    Raises ConfigError for what is wrong with the configuration, the model's shape, the memory or the port.
    """
    check_cluster(config.cluster)
    if config.cluster.pd is not None or config.cluster.data_parallel_size > 1:
        return serve_cluster(config, on_ready=on_ready, on_resolved=on_resolved)
    resolved = complete(config, probe())
    with listening_socket(resolved.config.server) as sock, contextlib.ExitStack() as stack:
        if on_resolved is not None:
            on_resolved(resolved)
        shared = ""
        if resolved.config.cache.kv_pool_listen is not None:  # it answers others while the engine computes
            shared = stack.enter_context(contextlib.closing(SocketDirectory())).path
            stack.enter_context(contextlib.closing(PoolProcess(resolved.config, shared)))
        engine = EngineProcess(resolved, seat_of(resolved), shared)
        try:
            return int(import_server().run(resolved, engine, sock, on_ready))
        finally:
            if engine.poll() is None:  # only where the server could not even begin
                engine.kill()
