"""The server of one machine: the HTTP front end in this process, the engine in its own. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from penstock.build.handover import encode_resolved
from penstock.config.complete import Resolved, complete
from penstock.config.hardware import probe
from penstock.config.load import model_directory
from penstock.config.openmp import bound_spinning
from penstock.config.schema import Config
from penstock.engine.messages import Ready
from penstock.engine.tokenizer import load_tokenizer
from penstock.server.serve import run_server, served_model
from penstock.server.state import Served


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
    resolved = complete(config, probe())

    def start(address: str) -> subprocess.Popen[bytes]:
        if on_resolved is not None:
            on_resolved(resolved)
        return launch(resolved, address)

    def load() -> Served:
        assert resolved.config.model.tokenizer is not None
        tokenizer = load_tokenizer(model_directory(resolved.config.model.tokenizer))
        return served_model(resolved.config, resolved.directory, tokenizer, resolved.model.vocab_size)

    return run_server(resolved.config, start, load, on_ready=on_ready)


def launch(resolved: Resolved, address: str) -> subprocess.Popen[bytes]:
    """Start an engine process that dials `address`. Its log goes where ours goes."""
    command = [sys.executable, "-m", "penstock.build.engine", address, repr(time.monotonic())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=_environment(resolved))
    assert process.stdin is not None
    encoded = encode_resolved(resolved)
    process.stdin.write(len(encoded).to_bytes(8, "little") + encoded)
    process.stdin.flush()  # and stays open: its end tells the engine that this process is gone
    return process


def _environment(resolved: Resolved) -> dict[str, str]:
    """Ours, with what OpenMP must know before torch is imported, and this package findable as it was for us."""
    source = str(Path(__file__).parents[2])
    path = os.environ.get("PYTHONPATH")
    threads = str(resolved.config.runtime.num_threads)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source,
        "OMP_NUM_THREADS": threads,
    }
    bound_spinning(environment)
    return environment
