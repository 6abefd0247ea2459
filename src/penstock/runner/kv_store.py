"""The KV pools of one rank: memory by layer, in the byte layout that `KVGroup.extent` publishes."""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np
import torch
from torch import Tensor

from penstock.config.model import KVLayout

HUGE_PAGE_BYTES = 2 << 20


class KVStore:
    """`pools[layer]`: [num_blocks, 2, Hkv, block_size, D], zero-filled: an unwritten value must not be a NaN.
    Whoever writes a block's first tokens therefore zeroes the rest of it.

    With scales: int8 [num_blocks, 2, Hkv, head_bytes], each head's elements and then its scales, as bytes.
    """

    def __init__(self, layout: KVLayout, num_blocks: tuple[int, ...], device: torch.device) -> None:
        self.layout = layout
        self.pools: list[Tensor] = []
        by_layer = {
            layer: (group, blocks)
            for group, blocks in zip(layout.groups, num_blocks, strict=True)
            for layer in group.layers
        }
        for layer in range(len(by_layer)):
            group, blocks = by_layer[layer]
            head = (group.block_size, group.head_dim) if group.scale_dtype is None else (group.head_bytes,)
            shape = (blocks, 2, group.num_kv_heads, *head)
            self.pools.append(_zeros(shape, getattr(torch, group.dtype)).to(device))

    @property
    def num_bytes(self) -> int:
        return sum(pool.numel() * pool.element_size() for pool in self.pools)

    def byte_views(self) -> list[np.ndarray]:
        """Per layer the pool's own memory, uint8 [num_blocks, layer_bytes]; extents lie as `KVGroup.extent` says."""
        of_layer = {layer: group.layer_bytes for group in self.layout.groups for layer in group.layers}
        return [
            pool.view(torch.uint8).view(pool.shape[0], of_layer[layer]).numpy() for layer, pool in enumerate(self.pools)
        ]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the kernel provides at first touch: torch.zeros writes all of them, seconds for gigabytes.

    In huge pages where the system has them: blocks lie anywhere, and each would cost an address translation.
    """
    num_bytes = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    if num_bytes == 0:
        return torch.zeros(shape, dtype=dtype)
    # Private: what could be shared gets huge pages only where shmem_enabled says so, and by default it says never.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE_BYTES
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(shape)
