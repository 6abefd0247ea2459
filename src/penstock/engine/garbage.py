"""How often Python looks for circles of garbage while an engine runs.

A token makes some 30 short-lived objects: with the defaults a step of many requests looks several times for circles
among them, and among everything that is waiting.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (20_000, 10, 5)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Look seldom meanwhile; afterwards as often as before."""
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
