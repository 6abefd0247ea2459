"""The front end of a server: HTTP in this process, around an engine that was launched already. Imports no torch."""

from __future__ import annotations

import socket
from collections.abc import Callable

from penstock.build.launch import EngineProcess
from penstock.cluster.beats import Silences
from penstock.cluster.placement import PolicyPlacement
from penstock.cluster.restarts import Restarts
from penstock.cluster.roles import RoleKeeper
from penstock.cluster.router import Router
from penstock.config.complete import Resolved
from penstock.config.load import model_directory
from penstock.core.route_modes import ModeLimits
from penstock.engine.messages import Ready
from penstock.engine.tokenizer import load_tokenizer
from penstock.server.backend import ManyEngines, OneEngine
from penstock.server.serve import run_server, served_model
from penstock.server.state import Served


def run_cluster(
    resolved: Resolved,
    roles: dict[str, str],
    launch: Callable[[str, str], EngineProcess],
    sock: socket.socket,
    on_ready: Callable[[Ready, str], None] | None = None,
) -> int:
    """As `run`, with a router before engines. `launch(name, address)` starts one, or one more time."""
    options = resolved.config.cluster
    limits = ModeLimits(
        max_output_on_p=options.pd_max_short_output,
        max_total_on_p=ModeLimits().max_total_on_p if options.pd_max_short_output else 0,
        max_new_on_d=options.pd_min_tokens,
    )
    placement = PolicyPlacement(roles, options.route_policy, options.decode_policy, limits)
    keeper = None if options.pd is None else RoleKeeper(placement.cost, may_change=options.pd_scaling)
    router = Router(roles, placement, keeper)
    backend = ManyEngines(router, launch, Restarts(options.engine_restarts), Silences(options.engine_hang_s))
    return int(run_server(resolved.config, backend, lambda: _served(resolved), on_ready=on_ready, sock=sock))


def _served(resolved: Resolved) -> Served:
    assert resolved.config.model.tokenizer is not None
    tokenizer = load_tokenizer(model_directory(resolved.config.model.tokenizer))
    return served_model(resolved.config, resolved.directory, tokenizer, resolved.model.vocab_size)


def run(
    resolved: Resolved,
    engine: EngineProcess,
    sock: socket.socket,
    on_ready: Callable[[Ready, str], None] | None = None,
) -> int:
    """Serve until a signal; the exit code. Closes `sock`. Raises ConfigError for a certificate that cannot be used."""

    def start(address: str) -> EngineProcess:
        engine.dial(address)
        return engine

    return int(run_server(resolved.config, OneEngine(start), lambda: _served(resolved), on_ready=on_ready, sock=sock))
