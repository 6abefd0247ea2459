"""An engine that has a seat in a cluster: its two sides of the hand-off, its inbox, its loop; what tells routers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import msgspec

from penstock.build.engine import BuiltEngine
from penstock.cluster.account import link_reports
from penstock.cluster.beat_pipe import beating
from penstock.cluster.decode_side import DecodeSide
from penstock.cluster.loop import MemberLoop
from penstock.cluster.member import Member
from penstock.cluster.peers import PeerWire
from penstock.cluster.prefill_side import PrefillSide
from penstock.cluster.publisher import EventPublisher
from penstock.cluster.seat import Seat
from penstock.config.kv_events import EventSettings
from penstock.engine.messages import Peer
from penstock.engine.wire import ZmqWire


def member_loop(
    built: BuiltEngine, seat: Seat, front: ZmqWire, events: EventSettings | None = None, beats: int | None = None
) -> Callable[[], None]:
    """What runs the engine until it has drained. Says Ready first. Raises zmq.ZMQError, ConfigError.

    `events`: how routers elsewhere are told of its cache; then they alone are. `beats`: the pipe to beat into.
    """
    links, counter = built.links, built.counter
    assert links is not None and counter is not None
    layout, link = built.engine.scheduler.layout, links.addresses[0]
    incarnation = f"{seat.name}.{secrets.token_hex(4)}"
    peers = PeerWire("", seat.host, seat.secret) if seat.host else PeerWire(seat.name, seat.directory)
    decode = DecodeSide(peers.name, link, incarnation, seat.lease_s, seat.min_tokens)
    member = Member(built.engine, decode, PrefillSide(layout.format), life=time.time_ns())
    front.send(msgspec.structs.replace(built.ready, peer=Peer(seat.name, seat.role, peers.address, link, seat.model)))
    loop = MemberLoop(member, built.executor, front, peers, time.monotonic)
    if beats is not None:
        beating(beats, lambda: loop.num_rounds + counter.value)
    reporter = built.engine.reporter
    reporter.name, reporter.role, built.engine.timeline.engine = seat.name, seat.role, seat.name
    reporter.links = lambda: link_reports(links.stats(), loop.names, member.prefill)

    publisher = None if events is None else event_publisher(built, events)

    def run() -> None:
        try:
            loop.run(None if publisher is None else publisher.turn)
        finally:
            peers.close()

    return run


def event_publisher(built: BuiltEngine, settings: EventSettings) -> EventPublisher:
    """What tells routers elsewhere of the engine's cache. Raises ConfigError for an address that cannot be had."""
    return EventPublisher(settings, built.ready.model_id, built.engine.scheduler.kv)
