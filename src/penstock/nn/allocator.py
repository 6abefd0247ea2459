"""What the process keeps for torch: freed memory, told to stay; compiled kernels, told not to pile up. Knows no tensor.

Torch frees and allocates activations at every operation. glibc maps large ones anew each time, and each first touch of
a page costs a fault: an RMSNorm of [2048, 384] took 3.6 ms instead of 0.4 ms.

oneDNN compiles a kernel for every shape of a matrix product in bfloat16 and keeps 1,024 of them, and so does the layer
of torch above it. A serving engine sees a new number of tokens in most steps, so that a small model's process grew from
0.5 to 1.0 GB within two minutes of `benchmarks/soak.py`. Making one takes about 0.2 ms.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MMAP_ABOVE = 32 << 20  # the most that glibc accepts
_KEEP = 2**31 - 1
_TOP_PAD = 64 << 20
MAX_KERNELS = 64  # per cache: the products of some ten steps; 300 shapes of 4 layers take 0.1 GB instead of 0.9


def keep_freed_memory() -> bool:
    """Serve tensors below 32 MiB from the heap and never give it back. False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _MMAP_ABOVE), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)


def bound_kernel_caches() -> None:
    """Keep at most MAX_KERNELS compiled kernels in each of the two caches. Works until the first product in bfloat16.

    Through the environment, because there is no other door. Source: oneDNN's developer guide, "Primitive Cache".
    """
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = str(MAX_KERNELS)
