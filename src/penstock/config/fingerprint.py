"""What a checkpoint is, wherever it lies: so that engines on several machines can tell whether theirs are the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE_BYTES = 1 << 20  # of each end of a weight file: reading all of it would take as long as loading
NUM_PIECES, INNER_BYTES = 64, 4096  # between the ends: a checkpoint may differ from another in its middle layers only
# Raised when a checkpoint and its settings begin to give other numbers than rounding in another order does, so that KV
# of before, on disks or on other machines, is nobody's. 2: inputs of the down projection are rotated (w8a8, w4a8).
NUMBERS = 2


def model_fingerprint(directory: Path, *settings: object) -> str:
    """Of config.json, names, sizes and pieces of weight files, what else decides on the numbers. Raises OSError."""
    digest = hashlib.blake2b(repr((NUMBERS, *settings)).encode(), digest_size=16)
    digest.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(PIECE_BYTES))
            for n in range(1, NUM_PIECES):
                file.seek(num_bytes * n // NUM_PIECES)
                digest.update(file.read(INNER_BYTES))
            file.seek(max(0, num_bytes - PIECE_BYTES))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
