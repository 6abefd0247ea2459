"""KV on its way: what a scheduler has asked to be moved, the blocks that are pinned for it, and how it ends.

Makes moves and takes their results in; carries nothing. Knows requests, blocks and tickets; no link, tier or clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.core.blocks import BlockPool
from penstock.core.kv_cache import KVCache
from penstock.core.moves import DEVICE, KVMove, MoveResult, Place
from penstock.core.request import Request

GATE = "kv"  # of Request.waiting_for: its prompt's beginning is on its way


@dataclass(frozen=True, slots=True)
class Offer:
    """KV of a request's first `num_tokens` tokens can come from `src`, as far as the device lacks it.

    Whole blocks, except that an offer of all known tokens may end inside one.
    """

    num_tokens: int
    src: Place
    transfer_id: str
    epoch: int = 0
    is_cache: bool = False  # it was computed for somebody else: it counts as cached


@dataclass(slots=True)
class Flight:
    """A move that has not ended. `request`: None for a save, which is nobody's."""

    move: KVMove
    request: Request | None
    start: int = 0  # of a receipt: tokens [start, end) are computed once it is there
    end: int = 0
    is_cache: bool = False
    filling: tuple[bytes, ...] = ()  # of a receipt: hashes that others may wait for


class Traffic:
    """Moves of one engine. `started` and `cancelled` are for its mover, which empties them."""

    def __init__(self, kv: KVCache) -> None:
        self.started: list[KVMove] = []
        self.cancelled: list[int] = []
        self.flights: dict[int, Flight] = {}
        self._kv = kv
        self._num_moves = 0

    def receive(self, request: Request, offer: Offer, shut: bool = True) -> None:
        """Ask for what the request's device blocks lack of an offer; blocks are reserved. `shut`: its gate, there."""
        kv, first = self._kv, request.num_computed // self._kv.block_size
        last = -(-offer.num_tokens // kv.block_size)
        blocks = tuple(tuple(table[first:last]) for table in request.block_tables)
        dst = Place(DEVICE, blocks)
        filling = tuple(kv.begin_filling(request, request.num_computed, offer.num_tokens))
        move = self._start(request, offer.transfer_id, offer.src, dst, offer.epoch, -1)
        self.flights[move.id] = Flight(
            move, request, request.num_computed, offer.num_tokens, offer.is_cache, filling=filling
        )
        request.arriving = move.id
        if shut:
            request.waiting_for[GATE] = request.num_computed

    def send(self, request: Request, end: int, after_step: int) -> None:
        """Send what the request's ticket wants and step `after_step` completes: tokens up to `end`. -1: it is there."""
        ticket, size = request.ticket, self._kv.block_size
        if ticket is None:
            return
        first = max(request.num_sent, ticket.first_block)
        last = -(-ticket.num_tokens // size) if end >= ticket.num_tokens else end // size
        if last <= first:
            return
        request.num_sent = last
        src, dst = [], []
        for table, wanted in zip(request.block_tables, ticket.block_ids, strict=True):
            pairs = [(table[n], wanted[n - ticket.first_block]) for n in range(first, last)]
            pairs = [pair for pair in pairs if pair[1]]
            src.append(tuple(here for here, _ in pairs))
            dst.append(tuple(there for _, there in pairs))
        here, there = Place(DEVICE, tuple(src)), Place(ticket.link, tuple(dst))
        move = self._start(request, ticket.transfer_id, here, there, ticket.epoch, after_step)
        self.flights[move.id] = Flight(move, request)

    def save(self, src: Place, dst: Place) -> KVMove:
        """Copy published blocks into a tier."""
        move = self._start(None, "", src, dst, 0, -1)
        self.flights[move.id] = Flight(move, None)
        return move

    def drop(self, request: Request) -> None:
        """The request no longer waits for what is on its way to it."""
        if request.arriving < 0:
            return
        self.cancelled.append(request.arriving)
        self._land(request, self.flights[request.arriving])

    def land(self, request: Request) -> Flight:
        """A step has read all that was on its way to the request: it is there. The move itself ends later."""
        flight = self.flights[request.arriving]
        self._land(request, flight)
        return flight

    def end(self, result: MoveResult) -> Flight | None:
        """A move has ended: its blocks are unpinned. Gives a receipt that its request still waited for."""
        flight = self.flights.pop(result.id, None)
        if flight is None:
            return None
        for pool, id_ in self._pins(flight.move):
            pool.unpin(id_)
        request = flight.request
        if request is None or request.arriving != result.id:
            return None
        self._land(request, flight)
        return flight

    def _land(self, request: Request, flight: Flight) -> None:
        self._kv.end_filling(flight.filling)
        flight.filling = ()
        request.arriving = -1
        request.waiting_for.pop(GATE, None)

    def _start(
        self,
        request: Request | None,
        transfer_id: str,
        src: Place,
        dst: Place,
        epoch: int,
        after_step: int,
    ) -> KVMove:
        request_id = "" if request is None else request.id
        move = KVMove(self._num_moves, transfer_id, request_id, src, dst, epoch, after_step)
        self._num_moves += 1
        for pool, id_ in self._pins(move):
            pool.pin(id_)
        self.started.append(move)
        return move

    def _pins(self, move: KVMove) -> Iterator[tuple[BlockPool, int]]:
        place = move.src if move.src.where == DEVICE else move.dst
        for pool, ids in zip(self._kv.pools, place.block_ids, strict=True):
            for id_ in ids:
                if id_:
                    yield pool, id_
