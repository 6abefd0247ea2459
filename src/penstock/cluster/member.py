"""One engine among others: it computes prompts for its peers, and decodes what they computed.

A state machine around an Engine and the two sides of the hand-off: messages from its front end and its peers come in,
messages to them go out. No socket, clock or thread: the live loop and the fault simulation drive the same object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.cluster.decode_side import DecodeSide
from penstock.cluster.messages import Ack, Prefill, Refused, Stop, ToPeer
from penstock.cluster.prefill_side import PrefillSide
from penstock.core.kv_events import KVEventSource
from penstock.core.moves import KVMove, MoveResult
from penstock.core.plan import StepResult
from penstock.core.tiering import PoolChanged
from penstock.engine.engine import Engine
from penstock.engine.messages import (
    AddRequest,
    CacheEvents,
    CacheSnapshot,
    Failed,
    FromEngine,
    HandOffs,
    Peers,
    ToEngine,
    Tokens,
    WantSnapshot,
)

FRONT = ""  # the front end's name among sources and destinations

Post = list[tuple[str, Any]]  # (to whom, message)


class Member:
    """Messages in, messages out; `launch` and `complete` around each step, as with an Engine.

    `life`: larger than that of any process that had this engine's name before.
    """

    def __init__(self, engine: Engine, decode: DecodeSide, prefill: PrefillSide, life: int = 0) -> None:
        assert engine.mover is not None
        self.engine = engine
        self.mover = engine.mover
        self.decode = decode
        self.prefill = prefill
        engine.watcher = self
        engine.reporter.handoffs = self.handoffs
        engine.reporter.tells_steps = True
        self.events = KVEventSource(decode.name, life, engine.scheduler.kv.events_pool.index.keys)
        engine.scheduler.kv.tell(self.events)
        decode.attach(engine.scheduler)
        if engine.tiers is not None:
            engine.tiers.tells_news = True

    # ---- messages ----

    def handle(self, source: str, message: Any, now: float) -> Post:
        """Take one message in, from the front end (FRONT) or a peer."""
        if source == FRONT:
            return self._from_front(message, now) + self._flush(now)
        return self._from_peer(source, message, now) + self._flush(now)

    def _from_front(self, message: ToEngine, now: float) -> Post:
        if isinstance(message, AddRequest) and message.prefill_at:
            self.decode.want(message)
        elif isinstance(message, WantSnapshot):
            if not message.of_pool:
                return [(FRONT, CacheSnapshot(self.events.snapshot()))]
            if self.engine.tiers is not None:
                self.engine.tiers.ask_contents(now)
            return []
        elif isinstance(message, Peers):
            names = {peer.name for peer in message.peers}
            for move_id in self.decode.only(names):
                self.mover.cancel(move_id)
            self.prefill.only(names)
        return self._out(self.engine.handle(message, now), now)

    def _from_peer(self, peer: str, message: ToPeer, now: float) -> Post:
        if isinstance(message, Prefill):
            request = self.prefill.take(message, now)
            return [] if request is None else self._out(self.engine.add(request, now, message.ticket), now)
        if isinstance(message, Ack | Stop):
            self.prefill.handle(message, now)
            return []
        if isinstance(message, Refused):
            move_id = self.decode.refused(message)
            if move_id is not None:
                self.mover.cancel(move_id)
            return []
        given, receipts = self.decode.handle(peer, message, now)
        for receipt in receipts:
            self.mover.expect(*receipt)
        return self._out(self.engine.deliver(given, now), now)

    # ---- steps ----

    def launch(self, now: float) -> Post:
        """See Engine.launch; also what hand-offs ask for now."""
        self.prefill.tick(now)
        for move_id in self.decode.expired(now):
            self.mover.cancel(move_id)
        out = self._out(self.engine.launch(now), now)
        events = self.events.take(now)
        if events is not None:
            out.append((FRONT, CacheEvents(events)))
        if self.engine.tiers is not None:
            for news in self.engine.tiers.news():
                told = CacheEvents(news.events) if isinstance(news, PoolChanged) else CacheSnapshot(news.snapshot)
                out.append((FRONT, told))
        return out + self._flush(now)

    def complete(self, result: StepResult, now: float) -> Post:
        """See Engine.complete."""
        out = self._out(self.engine.complete(result, now), now)
        return out + self._flush(now)

    # ---- moves: a MoveWatcher ----

    def started(self, move: KVMove, now: float) -> None:
        self.decode.started(move, now)
        self.prefill.started(move, now)

    def ended(self, move: KVMove, result: MoveResult, now: float) -> None:
        self.decode.ended(move, result, now)
        self.prefill.ended(move, result, now)

    def handoffs(self) -> HandOffs:
        """Both sides in numbers."""
        decode, prefill = self.decode, self.prefill
        return HandOffs(
            num_sent=prefill.num_sent,
            num_received=decode.num_received,
            num_failed=decode.num_failed,
            num_local=decode.num_local,
            num_sending=len(prefill.live),
            num_receiving=decode.num_in_flight,
            tokens_received=decode.tokens_received,
            tokens_received_cached=decode.tokens_received_cached,
        )

    # ---- what goes out ----

    def _out(self, messages: Sequence[FromEngine], now: float) -> Post:
        """The engine's messages, less those about prompts that are computed for others."""
        out: Post = []
        for message in messages:
            if isinstance(message, Tokens):
                message = self._own(message, now)
                if not message.deltas:
                    continue
            elif isinstance(message, Failed):
                if self.prefill.owns(message.request_id):
                    self.prefill.failed(message.request_id, message.code, message.message)
                    continue
                self.decode.forget(message.request_id)
            out.append((FRONT, message))
        return out

    def _own(self, message: Tokens, now: float) -> Tokens:
        own = []
        for delta in message.deltas:
            if self.prefill.owns(delta.request_id):
                self.prefill.sampled(delta, now)
                continue
            if delta.finish_reason is not None:
                self.decode.forget(delta.request_id)
            own.append(delta)
        return message if len(own) == len(message.deltas) else msgspec.structs.replace(message, deltas=own)

    def _flush(self, now: float) -> Post:
        """What the two sides have to say, and have to end."""
        prefill, decode = self.prefill, self.decode
        ended, prefill.ended_requests = prefill.ended_requests, []
        for request_id in ended:
            self.engine.drop(request_id, now)
        cancelled, prefill.cancelled = prefill.cancelled, []
        for move_id in cancelled:
            self.mover.cancel(move_id)
        post: Post = [*decode.outbox, *prefill.outbox]
        decode.outbox, prefill.outbox = [], []
        return post
