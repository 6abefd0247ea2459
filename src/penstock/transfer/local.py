"""The link inside one process: from pool to pool in one copy, with the frames and the checks of the others."""

from __future__ import annotations

import hmac
import threading
from dataclasses import dataclass

from penstock.transfer.cursor import Cursor, pour
from penstock.transfer.frames import Identity, LinkError, LinkRefused
from penstock.transfer.receipts import SLICE_BYTES, FrameReader, Receipts


@dataclass(slots=True)
class Place:
    """Somebody who listens at a local address."""

    identity: Identity
    receipts: Receipts
    is_open: bool = True


# Like the port table of a machine, of which there is one as well.
_places: dict[str, Place] = {}
_lock = threading.Lock()


def listen(address: str, identity: Identity, receipts: Receipts) -> Place:
    """Be found at "local://name". Raises ValueError, OSError when the name is taken."""
    if not address.startswith("local://") or address == "local://":
        raise ValueError(f"{address!r} is not local://name")
    with _lock:
        if address in _places:
            raise OSError(f"{address} is in use")
        _places[address] = place = Place(identity, receipts)
    return place


def leave(address: str) -> None:
    with _lock:
        place = _places.pop(address, None)
    if place is not None:
        place.is_open = False


def dial(address: str, identity: Identity) -> LocalOutgoing:
    """Raises LinkError when nobody listens there, LinkRefused when it is none of ours."""
    with _lock:
        place = _places.get(address)
    if place is None:
        raise LinkError("nobody listens there")
    refuses = f"{place.identity.name} at {address} refuses {identity.name}"
    if not hmac.compare_digest(place.identity.secret, identity.secret):
        raise LinkRefused(f"{refuses}: it does not hold this cluster's secret")
    if place.identity.format != identity.format:
        raise LinkRefused(f"{refuses}: its KV format is {identity.format}, not {place.identity.format}")
    return LocalOutgoing(place, identity.name)


class LocalOutgoing:
    """`Outgoing` that is its own other end: the sender's thread copies."""

    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self._answered: list[int] = []
        self._reader = FrameReader(place.receipts, name, self._answered.append)

    def write(self, views: list[memoryview]) -> int:
        if not self._place.is_open:
            raise EOFError("the other end was closed")
        cursor = Cursor(views)
        while cursor.num_left:
            cursor.advance(self._reader.take(lambda targets: pour(targets, cursor.window(SLICE_BYTES))))
        return sum(map(len, views))

    def replies(self) -> list[int]:
        if not self._place.is_open:
            raise EOFError("the other end was closed")
        answered = self._answered[:]
        self._answered.clear()
        return answered

    def fileno(self) -> int:
        return -1

    def events(self, writing: bool) -> int:
        return 0

    def recheck_s(self) -> float | None:
        return None

    def close(self) -> None:
        pass
