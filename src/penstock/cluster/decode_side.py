"""A decode engine's side of the hand-off: prompts that peers compute, from reservation to the last byte.

A state machine: the engine's moves and the peers' messages come in, messages go out. Nothing here waits, and nothing
that a peer does or fails to do can cost more than time: a hand-off that does not end well is tried at the next peer,
and at last the prompt is computed here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Set
from dataclasses import dataclass

import msgspec

from penstock.cluster.messages import Ack, Alive, Commit, FirstToken, Prefill, Refused, Stop, ToPeer
from penstock.core.doors import KVSource
from penstock.core.moves import CANCELLED, KVMove, KVTicket, MoveResult, Place
from penstock.core.request import Request
from penstock.core.scheduler import Scheduler
from penstock.core.steps import Given, Progress
from penstock.core.traffic import Offer
from penstock.engine.messages import AddRequest

log = logging.getLogger("penstock.handoff")

MAX_TRIES = 8  # those included that this engine gave up itself for want of memory


@dataclass(slots=True)
class HandOff:
    """One request whose prompt peers may compute."""

    request: AddRequest
    peers: deque[str]
    num_tries: int = 0
    epoch: int = 0
    move_id: int = -1  # the receipt in flight
    until_s: float = 0.0  # the lease
    has_commit: bool = False  # everything has left the peer
    fault: str = ""  # why the receipt is being cancelled, if the peer is at fault
    first_token: int = 0  # of the prompt, that the peer is to send
    num_cached: int = 0  # prompt tokens that the peer's cache served


class DecodeSide:
    """Offers peers' KV to its scheduler (a KVSource) and watches over it.

    `name` and `link`: how peers call this engine and where they send to; `incarnation` tells this process from those
    that had the name before. `min_tokens`: a prompt that lacks less than that after the cache's part is computed here:
    it costs one small chunk.
    """

    def __init__(self, name: str, link: str, incarnation: str, lease_s: float = 5.0, min_tokens: int = 256) -> None:
        self.name, self.link, self.incarnation = name, link, incarnation
        self.lease_s, self.min_tokens = lease_s, min_tokens
        self.outbox: list[tuple[str, ToPeer]] = []
        self.num_received = self.num_failed = self.num_local = 0
        self.tokens_received = self.tokens_received_cached = 0  # of the latter the peers' caches had the KV
        self._scheduler: Scheduler | None = None
        self._other: KVSource | None = None
        self._num_epochs = 0  # over all hand-offs, so that an id used again is no old acquaintance
        self._live: dict[str, HandOff] = {}  # by request id

    def attach(self, scheduler: Scheduler) -> None:
        """Serve this scheduler, before it is used. Another source that it has is asked first."""
        self._scheduler, self._other = scheduler, scheduler.source
        scheduler.source = self

    def want(self, request: AddRequest) -> None:
        """A request that the scheduler is about to get, with peers that may compute its prompt."""
        self._live[request.request_id] = HandOff(request, deque(request.prefill_at))

    @property
    def num_in_flight(self) -> int:
        """Prompts that peers compute now."""
        return sum(hand_off.move_id >= 0 for hand_off in self._live.values())

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        hand_off = self._live.pop(request_id, None)
        if hand_off is not None and hand_off.move_id >= 0:
            self._stop(hand_off)

    # ---- what the scheduler asks, and what became of it ----

    def offer(self, request: Request, num_blocks: int, now: float) -> Offer | str | None:
        """See KVSource."""
        hand_off = self._live.get(request.id)
        other = None if self._other is None else self._other.offer(request, num_blocks, now)
        if hand_off is None or isinstance(other, str):
            return other
        num_tokens = len(hand_off.request.token_ids)
        is_same = len(request.token_ids) == num_tokens
        num_missing = num_tokens - (num_blocks * self._size if other is None else other.num_tokens)
        if not is_same or not hand_off.peers or num_missing < self.min_tokens or hand_off.num_tries >= MAX_TRIES:
            self.num_local += 1
            del self._live[request.id]
            return other
        self._num_epochs += 1
        return Offer(num_tokens, Place(hand_off.peers[0]), self._transfer_id(request.id), self._num_epochs)

    def started(self, move: KVMove, now: float) -> None:
        """The scheduler has reserved blocks: a peer is asked to fill them."""
        hand_off = self._live.get(move.request_id)
        if hand_off is None or move.src.where not in hand_off.peers:
            return
        hand_off.epoch, hand_off.move_id, hand_off.until_s = move.epoch, move.id, now + self.lease_s
        hand_off.num_tries, hand_off.fault, hand_off.num_cached = hand_off.num_tries + 1, "", 0
        hand_off.has_commit = False
        assert self._scheduler is not None
        request = hand_off.request
        first_block = -(-len(request.token_ids) // self._size) - len(move.dst.block_ids[0])
        hand_off.first_token = first_block * self._size
        deadline_s = None if request.deadline_s is None else request.deadline_s - now
        ticket = KVTicket(
            transfer_id=move.transfer_id,
            request_id=move.request_id,
            epoch=move.epoch,
            decode_engine=self.name,
            link=self.link,
            format=self._scheduler.layout.format,
            num_tokens=len(request.token_ids),
            first_block=first_block,
            block_ids=move.dst.block_ids,
            lease_s=self.lease_s,
        )
        relative = msgspec.structs.replace(
            request, arrival_s=now - request.arrival_s, deadline_s=deadline_s, prefill_at=()
        )
        self.outbox.append((hand_off.peers[0], Prefill(ticket, relative)))

    def ended(self, move: KVMove, result: MoveResult, now: float) -> None:
        """A receipt has ended; the scheduler knows already."""
        hand_off = self._live.get(move.request_id)
        if hand_off is None or hand_off.move_id != move.id:
            return
        hand_off.move_id = -1
        peer = hand_off.peers[0]
        if result.error is None:
            self.num_received += 1
            self.tokens_received += len(hand_off.request.token_ids) - hand_off.first_token
            self.tokens_received_cached += max(0, hand_off.num_cached - hand_off.first_token)
            del self._live[move.request_id]
            self.outbox.append((peer, Ack(move.transfer_id, move.epoch)))
            return
        self.num_failed += 1
        self.outbox.append((peer, Stop(move.transfer_id, move.epoch)))
        if hand_off.fault or result.error != CANCELLED:  # else this engine took the reserved blocks back itself
            log.warning("%s: %s does not compute its prompt: %s", move.request_id, peer, hand_off.fault or result.error)
            hand_off.peers.popleft()

    # ---- messages ----

    def handle(self, peer: str, message: ToPeer, now: float) -> tuple[list[Progress], list[tuple[int, int, int]]]:
        """What a peer says about a hand-off. Gives first tokens, and receipts to expect (move, units, checksum)."""
        if isinstance(message, Commit):
            first = message.first
            hand_off = self._current(first.transfer_id, first.epoch)
            if hand_off is None:
                self.outbox.append((peer, Ack(first.transfer_id, first.epoch)))
                return [], []
            if not hand_off.has_commit:  # what was sent arrives within one more lease, or never does
                hand_off.until_s, hand_off.has_commit = now + self.lease_s, True
            hand_off.num_cached = first.num_cached
            return self._give(first, now), [(hand_off.move_id, message.num_units, message.checksum)]
        if isinstance(message, FirstToken | Alive):
            hand_off = self._current(message.transfer_id, message.epoch)
            if hand_off is None:
                self.outbox.append((peer, Stop(message.transfer_id, message.epoch)))
                return [], []
            if not hand_off.has_commit:
                hand_off.until_s = now + self.lease_s
            return (self._give(message, now) if isinstance(message, FirstToken) else []), []
        return [], []

    def refused(self, message: Refused) -> int | None:
        """The receipt that will not be filled, to be cancelled; None if it is over already."""
        hand_off = self._current(message.transfer_id, message.epoch)
        if hand_off is None:
            return None
        hand_off.fault = message.reason
        return hand_off.move_id

    def expired(self, now: float) -> list[int]:
        """Receipts of which nothing was heard for a lease, or that are not whole that long after the commit: to be
        cancelled."""
        silent = [h for h in self._live.values() if h.move_id >= 0 and h.until_s < now and not h.fault]
        for hand_off in silent:
            heard = "all was sent, and not all has arrived" if hand_off.has_commit else "nothing was heard"
            hand_off.fault = f"{heard} for {self.lease_s} s"
        return [hand_off.move_id for hand_off in silent]

    def only(self, names: Set[str]) -> list[int]:
        """These peers are left: the receipts that the others were to fill, to be cancelled."""
        orphans = []
        for hand_off in self._live.values():
            if hand_off.move_id >= 0 and hand_off.peers[0] not in names:
                hand_off.fault = "it has ended"
                orphans.append(hand_off.move_id)
            first = [hand_off.peers[0]] if hand_off.move_id >= 0 else []  # leaves when the receipt has ended
            rest = list(hand_off.peers)[len(first) :]
            hand_off.peers = deque(first + [peer for peer in rest if peer in names])
        return orphans

    def _give(self, first: FirstToken, now: float) -> list[Progress]:
        assert self._scheduler is not None
        told = first.prompt_logprobs
        rest = None if told is None else told[1:]  # the first token's None is this engine's to add
        tokens = Given(list(first.token_ids), first.logprobs, rest)
        given = self._scheduler.give(self._request_id(first.transfer_id), first.position, tokens, now)
        if given is None:
            return []
        given.request.num_cached = max(given.request.num_cached, first.num_cached)
        return [given]

    def _current(self, transfer_id: str, epoch: int) -> HandOff | None:
        """The hand-off, if that is its epoch and its receipt is in flight."""
        hand_off = self._live.get(self._request_id(transfer_id))
        return hand_off if hand_off is not None and hand_off.epoch == epoch and hand_off.move_id >= 0 else None

    def _stop(self, hand_off: HandOff) -> None:
        transfer_id = self._transfer_id(hand_off.request.request_id)
        self.outbox.append((hand_off.peers[0], Stop(transfer_id, hand_off.epoch)))

    def _transfer_id(self, request_id: str) -> str:
        return f"{self.incarnation}:{request_id}"

    def _request_id(self, transfer_id: str) -> str:
        """ "" for a transfer of another incarnation."""
        incarnation, _, request_id = transfer_id.partition(":")
        return request_id if incarnation == self.incarnation else ""

    @property
    def _size(self) -> int:
        assert self._scheduler is not None
        return self._scheduler.block_size
