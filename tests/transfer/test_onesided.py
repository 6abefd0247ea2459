"""What the links over NIXL and Mooncake share, with a pretended library that writes late; and why it is as it is."""

from __future__ import annotations

import contextlib
import ctypes
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.transfer.rig import EXTRAS, LAYOUTS, LISTEN, SECRET, pair, receive_move, send_move, wait, wait_until
from tests.transfer.test_links import BIG

from penstock.transfer import listener, mover, nixl, onesided, tcp
from penstock.transfer.frames import Identity, LinkError, LinkRefused
from penstock.transfer.onesided import Offer, Staging
from penstock.transfer.ring import RING_BYTES
from penstock.transfer.streams import Greeting, say

IDS = [list(range(1, 65))]


class Pretended:
    """A `Library`, `Target` and `Writer` inside one process. A write moves its bytes when it is asked for the `slow`-th
    time, and no earlier."""

    scheme = "pretended"

    def __init__(self, slow: int = 3) -> None:
        self.slow, self.fault, self.ring_bytes = slow, "", RING_BYTES
        self.num_pumps = self.num_closed = 0

    def target(self, staging: Staging, host: str) -> Pretended:
        assert host == "127.0.0.1"
        return self

    def writer(self, staging: Staging, host: str, place: bytes, address: int) -> Pretended:
        assert place == b"here"
        self.here, self.there = staging.address, address
        return self

    def place(self) -> bytes:
        return b"here"

    def pump(self) -> None:
        self.num_pumps += 1

    def start(self, offset: int, num_bytes: int) -> Any:
        if self.fault:
            raise LinkError(self.fault)
        return SimpleNamespace(offset=offset, num_bytes=num_bytes, asked=0)

    def is_done(self, write: Any) -> bool:
        write.asked += 1
        if write.asked < self.slow:
            return False
        assert write.asked == self.slow, "asked again after it was done"
        ctypes.memmove(self.there + write.offset, self.here + write.offset, write.num_bytes)
        return True

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """In place of a link's file."""
    made = Pretended()
    carrier = SimpleNamespace(
        MAX_CONNECTIONS=4,
        listen=lambda address: onesided.listen("pretended", address),
        incoming=lambda sock, ring_bytes: onesided.incoming(made, sock, made.ring_bytes),
    )
    monkeypatch.setitem(listener.CARRIERS, "pretended", carrier)
    monkeypatch.setitem(mover.DIAL, "pretended", lambda address, identity: onesided.dial(made, address, identity))
    monkeypatch.setitem(LISTEN, "pretended", "pretended://127.0.0.1:0")
    yield made
    wait_until(lambda: made.num_closed == 2)  # the writer and the target of the only connection


@pytest.mark.parametrize("ring_bytes", [10_007, RING_BYTES])
def test_what_is_told_is_there(library: Pretended, ring_bytes: int) -> None:
    """Writes that end late, around a ring smaller than a block too: the receiver never reads ahead of them."""
    library.ring_bytes = ring_bytes
    with pair("pretended", BIG, 80) as rig:
        rig.d.start(receive_move(1, IDS))
        rig.p.start(send_move(1, rig.address, IDS, IDS))
        (sent,) = wait(rig.p)
        assert sent.error is None
        rig.d.expect(1, sent.num_units, sent.checksum)
        assert wait(rig.d)[0].error is None
        rig.assert_arrived(IDS, IDS)
        assert library.num_pumps


def test_a_link_at_rest_is_left_alone(library: Pretended) -> None:
    """Nobody looks after the library while nothing is on its way: it would cost a processor."""
    with pair("pretended", LAYOUTS["full"]) as rig:
        rig.p.start(send_move(1, rig.address, [[1]], [[1]]))
        assert wait(rig.p)[0].error is None
        wait_until(lambda: rig.d.received()["unknown"] == 1)
        before = library.num_pumps
        time.sleep(0.1)
        assert library.num_pumps <= before + 1


def test_a_write_that_fails_ends_the_move(library: Pretended) -> None:
    library.fault = "the card is on fire"
    with pair("pretended", LAYOUTS["full"]) as rig:
        rig.p.start(send_move(1, rig.address, [[1]], [[1]]))
        (sent,) = wait(rig.p)
        assert sent.error is not None
        assert "the card is on fire" in sent.error
        assert rig.address in sent.error


def test_addresses_of_a_ring_are_not_used_again() -> None:
    """What a late writer has in mind is never somebody else's memory; and it costs no memory."""
    seen: list[range] = []
    for _ in range(50):
        staging = Staging(1 << 20)
        staging.view[:] = b"x" * (1 << 20)
        mine = range(staging.address, staging.address + staging.num_bytes)
        assert not any(mine.start < other.stop and other.start < mine.stop for other in seen)
        seen.append(mine)
        staging.retire()
        assert staging.view[12345] == 0  # its pages went back to the system


@pytest.mark.parametrize("scheme", EXTRAS)
def test_a_writer_that_wakes_up_late_harms_nobody(scheme: str) -> None:
    """Its connection has ended and its transfer too. It writes over what it still knows: no pool changes, nor does any
    ring that was made since."""
    with pair(scheme, BIG, 80) as rig:
        identity = Identity("prefill-9", BIG.format, SECRET)
        stream = mover.DIAL[scheme](rig.address, identity)
        assert isinstance(stream, onesided.OneSidedOutgoing)
        num_retired = len(onesided._retired)
        stream._sock.close()
        wait_until(lambda: len(onesided._retired) > num_retired)
        fresh = [Staging(RING_BYTES) for _ in range(4)]
        stream._staging.view[:] = b"\xee" * RING_BYTES
        with contextlib.suppress(LinkError):
            write = stream._writer.start(0, RING_BYTES)
            until_s = time.monotonic() + 2.0
            while time.monotonic() < until_s and not stream._writer.is_done(write):
                time.sleep(1e-3)
        assert not any(np.frombuffer(each.view, np.uint8).any() for each in fresh)
        rig.assert_arrived([[]], [[]])
        rig.d.start(receive_move(1, IDS))  # and D goes on
        rig.p.start(send_move(1, rig.address, IDS, IDS))
        (sent,) = wait(rig.p)
        rig.d.expect(1, sent.num_units, sent.checksum)
        assert wait(rig.d)[0].error is None
        stream.close()


@pytest.mark.parametrize("scheme", EXTRAS)
def test_without_the_secret_no_ring_is_offered(scheme: str) -> None:
    """Where to write is said to those alone who have proved that they may."""
    with pair(scheme, LAYOUTS["full"]) as rig:
        place = tcp.parse(rig.address.replace(scheme, "tcp"))
        with socket.create_connection(place, timeout=5) as sock:
            stranger = Identity("prefill-9", LAYOUTS["full"].format, b"a guess")
            with pytest.raises(LinkRefused, match="secret"):
                Greeting(sock, stranger, rig.address).dial()
            sock.settimeout(5)
            assert sock.recv(1) == b""


@pytest.mark.parametrize("scheme", EXTRAS)
def test_what_the_other_end_offers_may_be_nonsense(scheme: str) -> None:
    """The sender's move ends with an error. The other end holds the secret and is broken."""
    offers: list[Any] = [Offer(0, 4096, b"x"), Offer(1 << 40, 4096, b"x"), Offer(4096, 4096, b"nonsense")]
    with socket.create_server(("127.0.0.1", 0)) as server, pair(scheme, LAYOUTS["full"]) as rig:
        port = server.getsockname()[1]

        def serve() -> None:
            for offer in offers:
                sock, _ = server.accept()
                tcp.prepare(sock)
                Greeting(sock, Identity("broken", LAYOUTS["full"].format, SECRET), "x").answer()
                say(sock, offer, time.monotonic() + 5)
                sock.recv(1)  # until the other end hangs up
                sock.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        for number in range(len(offers)):
            rig.p.start(send_move(number, f"{scheme}://127.0.0.1:{port}", [[1]], [[1]]))
            (sent,) = wait(rig.p)
            assert sent.error is not None
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("scheme", EXTRAS[:1])
def test_registration_does_not_keep_late_writes_out(scheme: str) -> None:
    """Why the pool is not registered: a write that comes after its region's registration was taken back still lands,
    where no network card checks it. Should this ever fail, NIXL has become safer than onesided.py says."""
    api = nixl.load()
    settings = api.nixl_agent_config(enable_prog_thread=False, sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE)
    ours, theirs = (api.nixl_agent(secrets.token_hex(4), settings) for _ in range(2))
    here, there = Staging(1 << 16), Staging(1 << 16)
    ours.register_memory([(here.address, here.num_bytes, 0, "")], "DRAM")
    region = theirs.register_memory([(there.address, there.num_bytes, 0, "")], "DRAM")
    peer = ours.add_remote_agent(theirs.get_agent_metadata()).decode()
    theirs.deregister_memory(region)
    here.view[:] = b"\xee" * here.num_bytes
    places = [ours.get_xfer_descs([(each.address, each.num_bytes, 0)], "DRAM") for each in (here, there)]
    write = ours.initialize_xfer("WRITE", *places, peer)
    state = ours.transfer(write)
    until_s = time.monotonic() + 10.0
    while state == "PROC" and time.monotonic() < until_s:
        theirs.get_new_notifs()
        state = ours.check_xfer_state(write)
    assert (state, bytes(there.view)) == ("DONE", bytes(here.view))
