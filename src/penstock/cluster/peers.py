"""How engines speak to each other: one inbox per engine, messages pushed into it. Knows zmq and the union of messages.

A message may be lost: a peer that is not there, or does not read, costs its sender nothing. Over TCP the line is
encrypted, and only those who know the cluster's secret can open it (CURVE; its keys are derived from the secret).
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import msgspec
import zmq
from zmq.utils import z85

from penstock.cluster.messages import ToPeer

log = logging.getLogger("penstock.peers")

MAX_QUEUED = 4096  # messages for one peer that does not read: later ones are lost
MAX_DIALLED = 256  # peers that are only known by their address; the one not spoken to for longest is let go


class _Envelope(msgspec.Struct, array_like=True, frozen=True):
    source: str
    message: ToPeer


def curve_keys(secret: str) -> tuple[bytes, bytes]:
    """(public, secret) key of a cluster, both in Z85: every engine has the same pair."""
    private = z85.encode(hashlib.blake2b(secret.encode(), digest_size=32, person=b"penstock-curve").digest())
    return zmq.curve_public(private), private


class PeerWire:
    """The inbox of the engine `name`, and the way to its peers. Not thread-safe.

    `place`: a directory that only this user can enter, for a socket file; or, with a `secret`, a host to listen on by
    TCP, on any port. `address`: where peers find the inbox; it is the engine's name where none is given, and whoever
    is named by an address can be spoken to without having been met.
    """

    def __init__(self, name: str, place: str, secret: str = "") -> None:
        self.name = name
        self.num_lost = 0
        self._secret = secret
        self._context = zmq.Context(io_threads=1)
        self._inbox = self._context.socket(zmq.PULL)
        self._outboxes: dict[str, zmq.Socket[bytes]] = {}
        self._addresses: dict[str, str] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Envelope)
        if not secret:
            self._inbox.bind(f"ipc://{place}/{name}.inbox")
        else:
            self._inbox.curve_server = True
            self._inbox.curve_publickey, self._inbox.curve_secretkey = curve_keys(secret)
            self._inbox.bind(f"tcp://{place}:*")
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self.name = name or self.address

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """To be polled for messages."""
        return self._inbox

    def meet(self, addresses: dict[str, str]) -> None:
        """These are the peers now: name -> address. Those that moved or went are disconnected."""
        for name, address in self._addresses.items():
            if addresses.get(name) != address and name in self._outboxes:
                self._outboxes.pop(name).close(linger=0)
        self._addresses = {name: address for name, address in addresses.items() if name != self.name}

    def send(self, peer: str, message: Any) -> None:
        """Never waits, never fails."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            address = peer if peer.startswith("tcp://") and self._secret else self._addresses.get(peer)
            if address is None:
                self.num_lost += 1
                return
            if len(self._outboxes) >= MAX_DIALLED:
                self._outboxes.pop(next(iter(self._outboxes))).close(linger=0)
            outbox = self._outboxes[peer] = self._context.socket(zmq.PUSH)
            outbox.setsockopt(zmq.SNDHWM, MAX_QUEUED)
            if address.startswith("tcp://"):
                public, private = curve_keys(self._secret)
                outbox.curve_serverkey, outbox.curve_publickey, outbox.curve_secretkey = public, public, private
            outbox.connect(address)
        else:
            self._outboxes[peer] = self._outboxes.pop(peer)  # the newest is the last
        try:
            outbox.send(self._encoder.encode(_Envelope(self.name, message)), zmq.NOBLOCK)
        except zmq.Again:
            self.num_lost += 1

    def receive(self, max_messages: int = 256) -> list[tuple[str, Any]]:
        """(from whom, what) that has arrived, without waiting."""
        received: list[tuple[str, Any]] = []
        while len(received) < max_messages:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                envelope = self._decoder.decode(frame)
            except (msgspec.DecodeError, ValueError) as error:
                log.error("dropped a peer's message that does not decode: %s", error)
                continue
            received.append((envelope.source, envelope.message))
        return received

    def close(self) -> None:
        """Free sockets and the address. What was not sent yet is lost."""
        for socket in (self._inbox, *self._outboxes.values()):
            socket.close(linger=0)
        self._outboxes.clear()
        self._context.term()
