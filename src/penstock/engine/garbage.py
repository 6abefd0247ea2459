"""How often Python looks for circles of garbage while an engine runs.

A token makes some 30 short-lived objects, none of them in a circle: with Python's own thresholds (700, 10, 10) every
step of many requests looks several times among them and among everything that is waiting. Looking at every 20,000 new
objects instead takes 2 to 6 % off what a step of 64 to 256 requests costs besides the model
(`benchmarks/step_overhead.py`, `step_us_mean` beside `step_us_mean_python_thresholds`). What is in circles stays 30
times as long; nobody has measured a program whose own circles, beside an `LLM`, hold much memory.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (20_000, 10, 5)

_lock = threading.Lock()
_users = 0
_before = (0, 0, 0)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Look seldom meanwhile; as often as before once the last of all users, in any thread, has left."""
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            _before = gc.get_threshold()
            gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                gc.set_threshold(*_before)
