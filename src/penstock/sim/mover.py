"""A pretended mover: KV between pretended engines on virtual time, layer by layer, over links that can break.

Knows moves and what blocks hold as opaque contents. Links deliver late, or break; what they deliver, they deliver in
order, as TCP and shared memory do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from penstock.config.model import KVLayout
from penstock.core.moves import CANCELLED, DEVICE, KVMove, MoveResult
from penstock.sim.clock import VirtualClock, stream

MASK = 2**64 - 1


class BlockMemory(Protocol):
    """What blocks of one engine hold."""

    def read(self, group: int, block_id: int) -> Any:
        """A copy of it."""
        ...

    def write(self, group: int, block_id: int, content: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class LinkFaults:
    """Seconds and probabilities. `breaks`: per move, that its link breaks while it sends; `alters`: per block."""

    delay_s: float = 0.0005
    jitter_s: float = 0.0
    block_s: float = 0.0001  # what one block takes on the link
    breaks: float = 0.0
    alters: float = 0.0


@dataclass(slots=True)
class _Unit:
    """A block on a link."""

    transfer_id: str
    epoch: int
    number: int
    group: int
    block_id: int
    content: Any
    num_layers: int


@dataclass(slots=True)
class _Receipt:
    move: KVMove
    wanted: set[tuple[int, int]]
    arrived: set[int] = field(default_factory=set)
    num_units: int = 0
    checksum: int = 0
    expected: tuple[int, int] | None = None


class PretendedLinks:
    """The links between all engines of a simulation. `SimMover`s register under their link address."""

    def __init__(self, clock: VirtualClock, seed: int, faults: LinkFaults | None = None) -> None:
        self.clock = clock
        self.faults = faults or LinkFaults()
        self.movers: dict[str, SimMover] = {}
        self.num_stale = 0  # units that came for a receipt that had ended
        self._seed = seed
        self._lines: dict[tuple[str, str], Random] = {}
        self._free_s: dict[tuple[str, str], float] = {}  # until when a line is busy
        self._stalled_s: dict[str, float] = {}

    def stall(self, address: str, until_s: float) -> None:
        """Nothing reaches `address` before; nothing is lost."""
        self._stalled_s[address] = until_s

    def send(self, source: str, address: str, units: Sequence[_Unit]) -> tuple[float, str | None]:
        """Units into a line: (when the last has left, why not all of them will arrive)."""
        line = (source, address)
        random = self._lines.setdefault(line, stream(self._seed, "link", *line))
        faults, now = self.faults, self.clock.now()
        broken_after = random.randrange(len(units) + 1) if random.random() < faults.breaks else None
        free_s = max(now, self._free_s.get(line, 0.0), self._stalled_s.get(address, 0.0))
        for n, unit in enumerate(units):
            if n == broken_after:
                return free_s, "the link broke"
            free_s += faults.block_s
            if random.random() < faults.alters:
                unit.content = ("altered", unit.content)
            arrival_s = free_s + faults.delay_s + random.random() * faults.jitter_s
            self._free_s[line] = free_s = max(free_s, arrival_s - faults.delay_s)
            self.clock.call_at(arrival_s, lambda unit=unit: self._arrive(address, unit))  # type: ignore[misc]
        if address not in self.movers:
            return free_s, f"{address} does not answer"
        return free_s, None

    def _arrive(self, address: str, unit: _Unit) -> None:
        mover = self.movers.get(address)
        if mover is None or not mover.take(unit):
            self.num_stale += 1


class SimMover:
    """The Mover door of one pretended engine. Its driver calls `computed(step)` when a step has ended.

    `notify` is called when `poll` has something.
    """

    def __init__(
        self, links: PretendedLinks, address: str, layout: KVLayout, memory: BlockMemory, notify: Callable[[], None]
    ) -> None:
        self.address = address
        self._links, self._layout, self._memory, self._notify = links, layout, memory, notify
        self._results: list[MoveResult] = []
        self._receipts: dict[tuple[str, int], _Receipt] = {}
        self._waiting: list[KVMove] = []  # for their step
        self._sending: set[int] = set()
        self._last_step = -1
        links.movers[address] = self

    # ---- the door ----

    def start(self, move: KVMove) -> None:
        if move.dst.where == DEVICE:
            wanted = {(g, id_) for g, ids in enumerate(move.dst.block_ids) for id_ in ids if id_}
            self._receipts[move.transfer_id, move.epoch] = _Receipt(move, wanted)
        elif move.after_step > self._last_step:
            self._waiting.append(move)
        else:
            self._send(move)

    def expect(self, move_id: int, num_units: int, checksum: int) -> None:
        for receipt in self._receipts.values():
            if receipt.move.id == move_id:
                receipt.expected = (num_units, checksum)
                self._look(receipt)
                return

    def cancel(self, move_id: int) -> None:
        for key, receipt in self._receipts.items():
            if receipt.move.id == move_id:
                del self._receipts[key]
                self._end(MoveResult(move_id, CANCELLED))
                return
        for move in self._waiting:
            if move.id == move_id:
                self._waiting.remove(move)
                self._end(MoveResult(move_id, CANCELLED))
                return
        if move_id in self._sending:
            self._sending.discard(move_id)
            self._end(MoveResult(move_id, CANCELLED))

    def poll(self) -> Sequence[MoveResult]:
        results, self._results = self._results, []
        return results

    # ---- what happens ----

    def computed(self, step: int) -> None:
        """A step has ended: moves behind it can read its blocks."""
        self._last_step = step
        ready = [move for move in self._waiting if move.after_step <= step]
        self._waiting = [move for move in self._waiting if move.after_step > step]
        for move in ready:
            self._send(move)

    def close(self) -> None:
        """The engine died."""
        self._links.movers.pop(self.address, None)

    def take(self, unit: _Unit) -> bool:
        """A unit has come; False when nobody waits for it."""
        receipt = self._receipts.get((unit.transfer_id, unit.epoch))
        if receipt is None or (unit.group, unit.block_id) not in receipt.wanted:
            return False
        self._memory.write(unit.group, unit.block_id, unit.content)
        if unit.number not in receipt.arrived:
            receipt.arrived.add(unit.number)
            receipt.num_units += unit.num_layers
            receipt.checksum = (receipt.checksum + self._checksum(unit)) & MASK
        self._look(receipt)
        return True

    def _look(self, receipt: _Receipt) -> None:
        """Has all of it come?"""
        if receipt.expected is None or receipt.num_units < receipt.expected[0]:
            return
        error = None if (receipt.num_units, receipt.checksum) == receipt.expected else "the KV was altered on its way"
        del self._receipts[receipt.move.transfer_id, receipt.move.epoch]
        self._end(MoveResult(receipt.move.id, error, receipt.num_units, checksum=receipt.checksum))

    def _send(self, move: KVMove) -> None:
        units = []
        for group, here, there in zip(self._layout.groups, move.src.block_ids, move.dst.block_ids, strict=True):
            for from_id, to_id in zip(here, there, strict=True):
                content, num_layers = self._memory.read(group.index, from_id), len(group.layers)
                number = to_id * len(self._layout.groups) + group.index  # both ends know it by the receiver's block
                units.append(_Unit(move.transfer_id, move.epoch, number, group.index, to_id, content, num_layers))
        checksum = sum(map(self._checksum, units)) & MASK
        num_units = sum(unit.num_layers for unit in units)
        left_s, error = self._links.send(self.address, move.dst.where, units)
        self._sending.add(move.id)

        def end() -> None:
            if move.id in self._sending:
                self._sending.discard(move.id)
                self._end(MoveResult(move.id, error, num_units, checksum=checksum))

        self._links.clock.call_at(left_s, end)

    def _end(self, result: MoveResult) -> None:
        self._results.append(result)
        self._notify()

    @staticmethod
    def _checksum(unit: _Unit) -> int:
        return zlib.crc32(repr(unit.content).encode(), unit.group) * (2 * unit.number + 1) & MASK
