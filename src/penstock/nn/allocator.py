"""The C library's allocator, told to keep what tensors give back. Knows no tensor.

Torch frees and allocates activations at every operation. glibc maps large ones anew each time, and each first touch of
a page costs a fault: an RMSNorm of [2048, 384] took 3.6 ms instead of 0.4 ms.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MMAP_ABOVE = 32 << 20  # the most that glibc accepts
_KEEP = 2**31 - 1
_TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Serve tensors below 32 MiB from the heap and never give it back. False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _MMAP_ABOVE), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)
