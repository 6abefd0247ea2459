"""A pretended network: wires between named parties that delay, lose, double, reorder and cut, all from one seed.

Knows names and messages as opaque things. Parties are told that something came; what they do about it is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from penstock.sim.clock import VirtualClock, stream


@dataclass(frozen=True, slots=True)
class LineFaults:
    """How a line treats messages. Probabilities are per message; times in seconds.

    Messages keep their order, as over TCP, but for those that are held back (`reorder`) and for second copies.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0  # up to this much more, drawn evenly
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    hold_back_s: float = 0.05  # at most: how much later a reordered message or a second copy comes


@dataclass(slots=True)
class _Line:
    """One direction between two parties."""

    faults: LineFaults
    random: Random
    last_s: float = 0.0  # when the newest message in order arrives
    stalled_until_s: float = 0.0
    is_cut: bool = False


class PretendedWire:
    """The `Wire` door: `party`'s end of the line to `peer`. `receive` gives what has arrived from that peer."""

    def __init__(self, network: PretendedNetwork, party: str, peer: str) -> None:
        self.party = party
        self.peer = peer
        self._network = network
        self._inbox: list[Any] = []

    def send(self, message: Any) -> None:
        """Into the network; it says nothing about whether the message will arrive."""
        self._network.carry(self.party, self.peer, message)

    def receive(self) -> Sequence[Any]:
        messages, self._inbox = self._inbox, []
        return messages

    def put(self, message: Any) -> None:
        """The network's side: a message has arrived."""
        self._inbox.append(message)

    def forget(self) -> None:
        """What has arrived and was not read is gone: the party died."""
        self._inbox.clear()


class PretendedNetwork:
    """All wires of a simulation. Every draw comes from `seed` and the line's two names.

    `on_arrival(party, peer)` is called when something has come for a party, in the event that brings it.
    """

    def __init__(
        self,
        clock: VirtualClock,
        seed: int,
        faults: LineFaults | None = None,
        on_arrival: Callable[[str, str], None] | None = None,
    ) -> None:
        self.clock = clock
        self.num_sent = 0
        self.num_lost = 0
        self.num_doubled = 0
        self.on_arrival = on_arrival or (lambda party, peer: None)
        self._seed = seed
        self._faults = faults or LineFaults()
        self._lines: dict[tuple[str, str], _Line] = {}
        self._wires: dict[tuple[str, str], PretendedWire] = {}
        self._lives: dict[str, int] = {}  # party -> times it died: what was on its way to an earlier life is lost
        self._dead: set[str] = set()

    def wire(self, party: str, peer: str) -> PretendedWire:
        """`party`'s end; the same object each time."""
        wire = self._wires.get((party, peer))
        if wire is None:
            wire = self._wires[party, peer] = PretendedWire(self, party, peer)
        return wire

    # ---- what can go wrong ----

    def set_faults(self, faults: LineFaults, party: str | None = None, peer: str | None = None) -> None:
        """From now on, for one direction or, without names, for all lines."""
        if party is None or peer is None:
            self._faults = faults
            for line in self._lines.values():
                line.faults = faults
        else:
            self._line(party, peer).faults = faults

    def cut(self, some: Iterable[str], others: Iterable[str]) -> None:
        """A partition: what is sent between the two sides from now on is lost, both ways. `heal` ends it."""
        others = list(others)
        for party in some:
            for peer in others:
                self._line(party, peer).is_cut = self._line(peer, party).is_cut = True

    def heal(self) -> None:
        """No line is cut any more. What was lost stays lost."""
        for line in self._lines.values():
            line.is_cut = False

    def stall(self, party: str, peer: str, until_s: float) -> None:
        """Messages sent from `party` to `peer` before `until_s` arrive after it, in order: nothing is lost."""
        self._line(party, peer).stalled_until_s = until_s

    def kill(self, party: str) -> None:
        """The party is gone, and with it all that was on its way to it or lay unread. What it sent arrives."""
        self._dead.add(party)
        self._lives[party] = self._lives.get(party, 0) + 1
        for (owner, _), wire in self._wires.items():
            if owner == party:
                wire.forget()

    def revive(self, party: str) -> None:
        """A new life under the old name."""
        self._dead.discard(party)

    # ---- how it goes ----

    def carry(self, party: str, peer: str, message: Any) -> None:
        """Take one message of `party` for `peer`."""
        line, now = self._line(party, peer), self.clock.now()
        faults, draw = line.faults, line.random.random
        # Always as many draws, so that a fault that is switched off leaves the others where they were.
        jitter, lost, doubled, held, how_long = draw(), draw(), draw(), draw(), draw()
        if party in self._dead:
            return
        self.num_sent += 1
        if line.is_cut or lost < faults.loss:
            self.num_lost += 1
            return
        earliest = max(now, line.stalled_until_s) + faults.delay_s
        arrival = max(line.last_s, earliest + jitter * faults.jitter_s)
        if held < faults.reorder:
            self._deliver_at(arrival + how_long * faults.hold_back_s, party, peer, message)
        else:
            line.last_s = arrival
            self._deliver_at(arrival, party, peer, message)
        if doubled < faults.duplicate:
            self.num_doubled += 1
            self._deliver_at(arrival + how_long * faults.hold_back_s, party, peer, message)

    def _deliver_at(self, when: float, party: str, peer: str, message: Any) -> None:
        life = self._lives.get(peer, 0)

        def deliver() -> None:
            if peer in self._dead or self._lives.get(peer, 0) != life:
                self.num_lost += 1
                return
            self.wire(peer, party).put(message)
            self.on_arrival(peer, party)

        self.clock.call_at(when, deliver)

    def _line(self, party: str, peer: str) -> _Line:
        line = self._lines.get((party, peer))
        if line is None:
            line = self._lines[party, peer] = _Line(self._faults, stream(self._seed, "wire", party, peer))
        return line
