"""What the front end hands to an engine process: a complete configuration, and its seat in a cluster if it has one.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from penstock.cluster.seat import Seat
from penstock.config.complete import Resolved


@dataclass(frozen=True, slots=True)
class Handover:
    """`pool`: the directory of the machine's KV pool, "" where the engine has one of its own or none."""

    resolved: Resolved
    seat: Seat | None = None
    pool: str = ""


def encode(handover: Handover) -> bytes:
    """For the engine process's standard input."""
    return msgspec.msgpack.encode(handover, enc_hook=str)


def decode(encoded: bytes) -> Handover:
    """What `encode` wrote."""
    return msgspec.msgpack.decode(encoded, type=Handover, dec_hook=lambda kind, value: kind(value))
