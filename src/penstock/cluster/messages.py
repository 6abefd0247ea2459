"""What engines say to each other about a prompt that one computes for another. Knows no socket.

Each message may be lost, doubled, late or out of order: transfer id and epoch say what it is about, and every answer
can be given again. Times are differences, for machines have clocks of their own.
"""

from __future__ import annotations

from penstock.core.moves import KVTicket
from penstock.core.plan import Logprobs
from penstock.engine.messages import AddRequest, Message


class Prefill(Message, frozen=True):
    """D to P: compute this prompt and send what the ticket wants.

    `request.arrival_s` is how long it has waited so far, `request.deadline_s` how long it has left.
    """

    ticket: KVTicket
    request: AddRequest


class FirstToken(Message, frozen=True):
    """P to D: what follows the prompt, at once; its KV may still be on the way."""

    transfer_id: str
    epoch: int
    position: int  # of the first of them
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached: int = 0  # prompt tokens that P's own cache or tiers served


class Commit(Message, frozen=True):
    """P to D: everything has left P: so many units, with this sum. Said again until it is answered."""

    first: FirstToken
    num_units: int
    checksum: int


class Ack(Message, frozen=True):
    """D to P: the hand-off is over, in one way or the other: forget it."""

    transfer_id: str
    epoch: int


class Alive(Message, frozen=True):
    """P to D: the prompt waits or is being computed; keep its reservation."""

    transfer_id: str
    epoch: int


class Refused(Message, frozen=True):
    """P to D: it will not be done here. `code` as in HTTP: 400 nobody can do it, 503 somebody else may."""

    transfer_id: str
    epoch: int
    code: int
    reason: str


class Stop(Message, frozen=True):
    """D to P: nobody wants it any more."""

    transfer_id: str
    epoch: int


ToPeer = Prefill | FirstToken | Commit | Ack | Alive | Refused | Stop
