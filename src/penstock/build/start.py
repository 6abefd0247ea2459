"""How a start begins: what need not wait for torch, or for a web server's packages, goes on while they are imported.

That import takes a second of one processor; the memory for weights, whose first touch is the other large part of a
start, is made ready on another meanwhile. This file and what it names at its top import no torch.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock.config.complete import Resolved, can_pack
from penstock.config.memory import packed_bytes
from penstock.config.openmp import bound_spinning
from penstock.nn.kernels.arena import begin_arena


class Stages:
    """The start-up timeline: which stage took how long. Consecutive, so that every second is accounted for."""

    def __init__(self, start_s: float) -> None:
        self.rows: list[tuple[str, float]] = []
        self._last_s = start_s

    def done(self, name: str) -> None:
        """The time since the last call belongs to `name`."""
        now = time.monotonic()
        self.rows.append((name, now - self._last_s))
        self._last_s = now


def begin(resolved: Resolved) -> Any | None:
    """Start what can go on by itself: an arena for `build_engine`, or None where plain torch will compute."""
    config = resolved.config
    if not can_pack(config.runtime.cpu_kernels, config.model.dtype, resolved.model, resolved.layout):
        return None
    return begin_arena(packed_bytes(resolved.model, config.model.quantization))


def import_builder() -> Any:
    """The module penstock.build.engine, and torch with it."""
    bound_spinning()
    return importlib.import_module("penstock.build.engine")


def import_member() -> Any:
    """The module penstock.build.member, which needs what `import_builder` has imported."""
    return importlib.import_module("penstock.build.member")


def import_server() -> Any:
    """The module penstock.build.front_end, and a web server with it."""
    return importlib.import_module("penstock.build.front_end")


@contextmanager
def no_collections() -> Iterator[None]:
    """No search for circles of garbage meanwhile: importing makes a million objects and drops none (0.1 s).

    What was made is old afterwards, so that the first search does not walk it; objects that the process has frozen
    stay so.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_enabled:
            gc.enable()
