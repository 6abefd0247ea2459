"""The front end of a server: HTTP in this process, around an engine that was launched already. Imports no torch."""

from __future__ import annotations

import socket
from collections.abc import Callable

from penstock.build.launch import EngineProcess
from penstock.config.complete import Resolved
from penstock.config.load import model_directory
from penstock.engine.messages import Ready
from penstock.engine.tokenizer import load_tokenizer
from penstock.server.backend import OneEngine
from penstock.server.serve import run_server, served_model
from penstock.server.state import Served


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

    def load() -> Served:
        assert resolved.config.model.tokenizer is not None
        tokenizer = load_tokenizer(model_directory(resolved.config.model.tokenizer))
        return served_model(resolved.config, resolved.directory, tokenizer, resolved.model.vocab_size)

    return int(run_server(resolved.config, OneEngine(start), load, on_ready=on_ready, sock=sock))
