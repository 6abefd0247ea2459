"""An engine's place in its cluster: all that its process must be told beside its configuration. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.config.values import ConfigError
from penstock.transfer import mooncake, nixl
from penstock.transfer.frames import LinkError

_LOAD = {"nixl": nixl.load, "mooncake": mooncake.load}


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
    link: str  # shm, tcp, nixl or mooncake; local: its peers are in the same process
    link_mode: str = "coalesced"
    cores: tuple[int, ...] = ()
    lease_s: float = 5.0
    min_tokens: int = 256
    host: str = ""
    model: str = ""


def chosen_link(setting: str, auto: str = "shm") -> str:
    """The link that `--kv-link` means; `auto`: for engines of one machine. Raises ConfigError for one whose library is
    not installed."""
    if setting in _LOAD:
        try:
            _LOAD[setting]()
        except LinkError as error:
            raise ConfigError(str(error), "--kv-link") from None
    return auto if setting == "auto" else setting
