"""An engine's place in its cluster: all that its process must be told beside its configuration. Plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seat:
    """`cores`: processors that the engine may use, as the system numbers them; none: all. `directory`: for socket
    files, one for all engines of a machine, that only its user can enter. `host`: where engines of other machines
    reach this one; then its peers know it by the address of its inbox, "tcp://host:port", and `model` is a fingerprint
    of what it computes with. "": it has none elsewhere.
    """

    name: str
    role: str  # prefill, decode or both
    directory: str
    secret: str
    link: str  # shm or tcp
    link_mode: str = "coalesced"
    cores: tuple[int, ...] = ()
    lease_s: float = 5.0
    min_tokens: int = 256
    host: str = ""
    model: str = ""


def chosen_link(setting: str) -> str:
    """The link that `--kv-link` means for engines of one machine."""
    return "shm" if setting == "auto" else setting
