"""The live loop of an engine among others: messages of its front end and its peers in, steps, messages out.

Knows wires and clock by their doors, as `engine.loop` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import zmq

from penstock.cluster.member import FRONT, Member, Post
from penstock.cluster.peers import PeerWire
from penstock.core.doors import Executor
from penstock.engine.messages import Peers
from penstock.engine.wire import ZmqWire

IDLE_WAIT_MS = 100  # deadlines and watchers are looked at this often
MOVING_WAIT_MS = 1  # while KV is on its way: its end is found by looking


class MemberLoop:
    """Drives one member until it has drained."""

    def __init__(
        self, member: Member, executor: Executor, front: ZmqWire, peers: PeerWire, now: Callable[[], float]
    ) -> None:
        self.member, self.executor, self.front, self.peers, self.now = member, executor, front, peers, now
        self.names: dict[str, str] = {}  # of the peers, by link address
        self.num_rounds = 0
        self._poller = zmq.Poller()
        self._poller.register(front.socket, zmq.POLLIN)
        self._poller.register(peers.socket, zmq.POLLIN)

    def run(self, beside: Callable[[float], None] | None = None) -> None:
        """Exceptions of the executor go to the caller: the engine cannot go on. `beside` is called once a round."""
        while not self.member.engine.stopped:
            if beside is not None:
                beside(self.now())
            if not self.turn():
                self._poller.poll(MOVING_WAIT_MS if self.member.engine.has_moves else IDLE_WAIT_MS)

    def turn(self) -> bool:
        """One round; False when there was nothing to do."""
        self.num_rounds += 1
        member, time = self.member, self.now()
        received: list[tuple[str, Any]] = [(FRONT, message) for message in self.front.receive()]
        received += self.peers.receive()
        for source, message in received:
            if isinstance(message, Peers):
                self.peers.meet({peer.name: peer.wire for peer in message.peers})
                self.names |= {peer.link: peer.name for peer in message.peers}
            self._post(member.handle(source, message, time))
        self._post(member.launch(self.now()))
        if not member.engine.scheduler.num_submitted:
            return bool(received)
        result = self.executor.collect()
        self._post(member.complete(result, self.now()))
        return True

    def _post(self, post: Post | Sequence[tuple[str, Any]]) -> None:
        for to, message in post:
            if to == FRONT:
                self.front.send(message)
            else:
                self.peers.send(to, message)
