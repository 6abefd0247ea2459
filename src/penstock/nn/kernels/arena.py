"""Memory for packed weights, made ready by a thread of its own while something else goes on: torch's import.

Knows bytes only: no torch, no weight, no model.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

extension: ModuleType | None = None
with contextlib.suppress(ImportError):  # nn.kernels.native says why, to those who ask for native kernels
    import penstock._native as extension


def begin_arena(num_bytes: int) -> Any | None:
    """Memory for PackedWeights of some `num_bytes`: what does not fit comes from the heap. None: it cannot be had."""
    if extension is None or num_bytes <= 0:
        return None
    try:
        return extension.Arena(num_bytes)
    except (MemoryError, RuntimeError):  # no address space for it, or no thread: weights go to the heap
        return None
