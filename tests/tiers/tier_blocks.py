"""Small layouts and blocks for the tests of the tiers' bytes."""

from __future__ import annotations

import zlib

import numpy as np

from penstock.config.model import KVGroup, KVLayout
from penstock.core.tiering import block_key
from penstock.tiers.record import RecordFormat


def layout_of(*windows: int | None, num_layers: int = 4, head_dim: int = 16) -> KVLayout:
    """One KV group per entry; its layers are every so-many-th of `num_layers`."""
    return KVLayout(
        tuple(
            KVGroup(
                index=g,
                kind="full" if window is None else "window",
                layers=tuple(range(g, num_layers, len(windows))),
                window=window,
                block_size=32,
                num_kv_heads=2,
                head_dim=head_dim,
                dtype="bfloat16",
            )
            for g, window in enumerate(windows)
        )
    )


ONE = layout_of(None)
TWO = layout_of(None, 64)


def key(number: int, group: int = 0) -> bytes:
    return block_key(number.to_bytes(16, "little"), group)


def record(format_: RecordFormat, name: bytes) -> np.ndarray:
    """The block `name`: content drawn from its name."""
    seed = zlib.crc32(name)
    made = np.random.default_rng(seed).integers(0, 256, format_.num_bytes, dtype=np.uint8)
    sums = tuple(zlib.crc32(format_.page(made, n).data) for n in range(format_.num_layers))
    format_.seal(made, name, sums)
    return made
