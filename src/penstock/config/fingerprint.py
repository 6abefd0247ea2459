"""What a checkpoint is, wherever it lies: so that engines on several machines can tell whether theirs are the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE_BYTES = 1 << 20  # of each end of a weight file: reading all of it would take as long as loading


def model_fingerprint(directory: Path, *settings: object) -> str:
    """Of config.json, the weight files' names, sizes and ends, and what else decides on the numbers. Raises OSError."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    digest.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(PIECE_BYTES))
            file.seek(max(0, num_bytes - PIECE_BYTES))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
