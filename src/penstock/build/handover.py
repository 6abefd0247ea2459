"""A complete configuration as the front end hands it to the engine process. Imports no torch."""

from __future__ import annotations

import msgspec

from penstock.config.complete import Resolved


def encode_resolved(resolved: Resolved) -> bytes:
    """For the engine process's standard input."""
    return msgspec.msgpack.encode(resolved, enc_hook=str)


def decode_resolved(encoded: bytes) -> Resolved:
    """What `encode_resolved` wrote."""
    return msgspec.msgpack.decode(encoded, type=Resolved, dec_hook=lambda kind, value: kind(value))
