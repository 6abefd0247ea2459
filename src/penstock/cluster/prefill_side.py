"""A prefill engine's side of the hand-off: prompts computed for decode engines, until their KV has arrived there.

A state machine like its other side. A prompt runs here as any prompt that makes one token; its blocks go to the prefix
cache when it has ended, pinned only while bytes leave, so that another decode engine can be served without computing it
again.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

import msgspec

from penstock.cluster.messages import Ack, Alive, Commit, FirstToken, Prefill, Refused, Stop, ToPeer
from penstock.core.moves import KVMove, KVTicket, MoveResult
from penstock.engine.messages import AddRequest, TokenDelta

COMMITS_PER_LEASE = 3  # an unanswered Commit is said again so often
MAX_LEASES = 3  # after so long without an answer the decode engine is held to be gone


@dataclass(slots=True)
class Sending:
    """One prompt and what has left of it."""

    ticket: KVTicket
    request_id: str  # its id on this engine
    moves: set[int] = field(default_factory=set)  # in flight
    num_units: int = 0
    checksum: int = 0
    first: FirstToken | None = None
    next_s: float = 0.0  # when the decode engine is to hear of it again
    heard_s: float = 0.0


class PrefillSide:
    """All prompts that this engine computes for others. `format`: of its own KV."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.outbox: list[tuple[str, ToPeer]] = []
        self.cancelled: list[int] = []  # moves to be cancelled
        self.ended_requests: list[str] = []  # requests of this engine to be ended
        self.num_sent = self.num_failed = self.num_bytes = 0
        self.live: dict[str, Sending] = {}  # by transfer id
        self._by_request: dict[str, Sending] = {}

    def take(self, message: Prefill, now: float) -> AddRequest | None:
        """What the engine is to run for a Prefill; None for one that is known, outdated or cannot be."""
        ticket, request = message.ticket, message.request
        known = self.live.get(ticket.transfer_id)
        if known is not None:
            if known.ticket.epoch >= ticket.epoch:
                return None
            self._drop(known)
        if ticket.format != self.format:
            reason = f"{ticket.decode_engine} keeps KV as {ticket.format}, this engine as {self.format}"
            self._refuse(ticket, 400, reason)
            return None
        request_id = f"{ticket.transfer_id}#{ticket.epoch}"
        sending = Sending(ticket, request_id, next_s=now + ticket.lease_s / COMMITS_PER_LEASE, heard_s=now)
        self.live[ticket.transfer_id] = self._by_request[request_id] = sending
        max_tokens = request.num_generated + 1
        params = replace(request.params, max_tokens=max_tokens, min_tokens=min(max_tokens, request.params.min_tokens))
        deadline_s = None if request.deadline_s is None else now + request.deadline_s
        return msgspec.structs.replace(
            request, request_id=request_id, params=params, arrival_s=now - request.arrival_s, deadline_s=deadline_s
        )

    def owns(self, request_id: str) -> bool:
        """Is this request of the engine one of ours?"""
        return request_id in self._by_request

    def failed(self, request_id: str, code: int, reason: str) -> None:
        """The engine refused the request, or failed it."""
        sending = self._by_request[request_id]
        self._refuse(sending.ticket, code, reason)
        self._drop(sending)

    def sampled(self, delta: TokenDelta, now: float) -> None:
        """The prompt is computed, and a token sampled behind it."""
        sending = self._by_request[delta.request_id]
        if not delta.token_ids:  # ended without: it was cancelled, or drained
            self.failed(delta.request_id, 503, "the prefill engine ended the prompt")
            return
        ticket = sending.ticket
        sending.first = FirstToken(
            ticket.transfer_id,
            ticket.epoch,
            ticket.num_tokens,
            list(delta.token_ids),
            delta.logprobs,
            delta.prompt_logprobs,
            delta.num_cached,
        )
        self.outbox.append((ticket.decode_engine, sending.first))
        self._commit_if_done(sending, now)

    def started(self, move: KVMove, now: float) -> None:
        """The engine begins to send a part of a prompt, or to move something else."""
        sending = self._by_request.get(move.request_id)
        if sending is not None and move.transfer_id == sending.ticket.transfer_id:
            sending.moves.add(move.id)

    def ended(self, move: KVMove, result: MoveResult, now: float) -> None:
        """A part has left, or could not."""
        sending = self._by_request.get(move.request_id)
        if sending is None or move.transfer_id != sending.ticket.transfer_id:
            return  # the prompt itself may come from a tier: that is no part of what is sent
        sending.moves.discard(move.id)
        if result.error is not None:
            self.num_failed += 1
            self.failed(move.request_id, 503, f"sending KV failed: {result.error}")
            return
        self.num_bytes += result.num_bytes
        sending.num_units += result.num_units
        sending.checksum = (sending.checksum + result.checksum) % 2**64
        self._commit_if_done(sending, now)

    def handle(self, message: Ack | Stop, now: float) -> None:
        """The decode engine is done with a hand-off, or does not want it any more."""
        sending = self.live.get(message.transfer_id)
        if sending is None or sending.ticket.epoch != message.epoch:
            return
        if isinstance(message, Ack) and sending.first is not None:
            self.num_sent += 1
        self._drop(sending)

    def tick(self, now: float) -> None:
        """Say again what was not answered, and give up who never answers."""
        for sending in [s for s in self.live.values() if s.next_s <= now]:
            ticket = sending.ticket
            sending.next_s = now + ticket.lease_s / COMMITS_PER_LEASE
            if not self._is_done(sending):
                self.outbox.append((ticket.decode_engine, Alive(ticket.transfer_id, ticket.epoch)))
            elif now - sending.heard_s > MAX_LEASES * ticket.lease_s:
                self._drop(sending)
            else:
                self._commit(sending)

    def only(self, peers: Set[str]) -> None:
        """These peers are left: nobody wants what was computed for the others."""
        for sending in [s for s in self.live.values() if s.ticket.decode_engine not in peers]:
            self._drop(sending)

    @property
    def next_s(self) -> float:
        """When `tick` has something to do."""
        return min((sending.next_s for sending in self.live.values()), default=float("inf"))

    @staticmethod
    def _is_done(sending: Sending) -> bool:
        return sending.first is not None and not sending.moves

    def _commit_if_done(self, sending: Sending, now: float) -> None:
        if self._is_done(sending):
            sending.heard_s = now
            sending.next_s = now + sending.ticket.lease_s / COMMITS_PER_LEASE
            self._commit(sending)

    def _commit(self, sending: Sending) -> None:
        assert sending.first is not None
        self.outbox.append((sending.ticket.decode_engine, Commit(sending.first, sending.num_units, sending.checksum)))

    def _refuse(self, ticket: KVTicket, code: int, reason: str) -> None:
        self.outbox.append((ticket.decode_engine, Refused(ticket.transfer_id, ticket.epoch, code, reason)))

    def _drop(self, sending: Sending) -> None:
        del self.live[sending.ticket.transfer_id]
        del self._by_request[sending.request_id]
        self.cancelled += sorted(sending.moves)
        self.ended_requests.append(sending.request_id)
