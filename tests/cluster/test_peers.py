"""Engines that know each other by address alone: they need one secret, and nothing else."""

from __future__ import annotations

import time

from penstock.cluster import peers
from penstock.cluster.messages import Ack
from penstock.cluster.peers import PeerWire


def received(wire, timeout_s):
    if not wire.socket.poll(int(1000 * timeout_s)):
        return []
    return wire.receive()


def test_an_address_is_a_name():
    with_secret = [PeerWire("", "127.0.0.1", "one") for _ in range(2)]
    stranger = PeerWire("", "127.0.0.1", "other")
    one, two = with_secret
    try:
        assert one.name == one.address and one.address.startswith("tcp://127.0.0.1:")
        stranger.send(two.name, Ack("stranger", 1))
        one.send(two.name, Ack("t", 1))
        assert received(two, 10.0) == [(one.name, Ack("t", 1))]
        two.send(one.name, Ack("t", 2))
        assert received(one, 10.0) == [(two.name, Ack("t", 2))]
        assert received(two, 0.3) == []  # the stranger is not let in
    finally:
        for wire in (one, two, stranger):
            wire.close()


def test_addresses_that_are_dialled_are_bounded(monkeypatch):
    monkeypatch.setattr(peers, "MAX_DIALLED", 3)
    one, two = (PeerWire("", "127.0.0.1", "one") for _ in range(2))
    try:
        for port in range(1, 8):
            one.send(f"tcp://127.0.0.1:{port}", Ack("t", 1))
        assert len(one._outboxes) == 3
        end = time.monotonic() + 10
        one.send(two.name, Ack("t", 2))
        found = []
        while not found and time.monotonic() < end:
            found = received(two, 0.1)
        assert found == [(one.name, Ack("t", 2))]
    finally:
        one.close()
        two.close()


def test_without_a_secret_no_address_is_dialled(tmp_path):
    wire = PeerWire("engine", str(tmp_path))
    try:
        wire.send("tcp://127.0.0.1:1", Ack("t", 1))
        assert wire.num_lost == 1
    finally:
        wire.close()
