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


def make_roles(pd: str | None, num_both: int) -> dict[str, str]:
    """Engine name -> role: of "1P1D" or "2p2d", or so many that do both phases. Raises ConfigError."""
    if pd is None:
        return {f"engine-{n}": "both" for n in range(num_both)}
    if num_both > 1:
        raise ConfigError("engines for one phase or for both, not some of each", "--pd and --data-parallel-size")
    return parse_roles(pd)


def parse_roles(text: str) -> dict[str, str]:
    """Engine name -> role, of "1P1D" or "2p2d". Raises ConfigError."""
    upper = text.strip().upper()
    prefill, p, rest = upper.partition("P")
    decode, d, end = rest.partition("D")
    if not (p and d and not end and prefill.isdecimal() and decode.isdecimal()):
        raise ConfigError(f"{text!r} is not of the form 1P1D", "--pd")
    num_prefill, num_decode = int(prefill), int(decode)
    if not (1 <= num_prefill <= 64 and 1 <= num_decode <= 64):
        raise ConfigError(f"{text!r}: between 1 and 64 engines of each role", "--pd")
    roles = {f"prefill-{n}": "prefill" for n in range(num_prefill)}
    return roles | {f"decode-{n}": "decode" for n in range(num_decode)}
