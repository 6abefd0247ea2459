"""Several movers as one: each move goes to the one that reaches its other end. Knows movers by their door."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.doors import Mover
from penstock.core.moves import KVMove, MoveResult
from penstock.core.tiering import HOST


class Movers:
    """A Mover of `tiers`, for host memory, and `links`, for peers. One of them may be missing."""

    def __init__(self, tiers: Mover | None, links: Mover | None) -> None:
        self._tiers, self._links = tiers, links
        self._by_move: dict[int, Mover] = {}

    def start(self, move: KVMove) -> None:
        mover = self._tiers if HOST in (move.src.where, move.dst.where) else self._links
        assert mover is not None, f"nothing carries from {move.src.where} to {move.dst.where}"
        self._by_move[move.id] = mover
        mover.start(move)

    def expect(self, move_id: int, num_units: int, checksum: int) -> None:
        mover = self._by_move.get(move_id)
        if mover is not None:
            mover.expect(move_id, num_units, checksum)

    def cancel(self, move_id: int) -> None:
        mover = self._by_move.get(move_id)
        if mover is not None:
            mover.cancel(move_id)

    def poll(self) -> Sequence[MoveResult]:
        results = [result for mover in (self._tiers, self._links) if mover is not None for result in mover.poll()]
        for result in results:
            self._by_move.pop(result.id, None)
        return results
