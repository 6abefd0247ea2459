"""The frame reader and the greeting against what broken and hostile peers send."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.transfer.rig import LAYOUTS, SECRET, pair, random_memory, receive_move, send_move, wait

from penstock.core.moves import MoveResult
from penstock.transfer import sending as sending_module
from penstock.transfer import streams
from penstock.transfer.counter import StepCounter
from penstock.transfer.cursor import Cursor, pour
from penstock.transfer.frames import (
    ABANDONED,
    LENGTH,
    MAX_HEADER_BYTES,
    WHOLE,
    Data,
    Identity,
    LinkError,
    LinkRefused,
    Ping,
    ProtocolError,
    header_bytes,
    pack_runs,
)
from penstock.transfer.receipts import FrameReader, Receipts
from penstock.transfer.sending import Sending

LAYOUT = LAYOUTS["full"]
ROOM = LAYOUT.groups[0].layer_bytes


class Desk:
    """A reader over fresh pools, fed with bytes."""

    def __init__(self) -> None:
        self.memory = random_memory(LAYOUT, 40, 2)
        self.results: list[MoveResult] = []
        self.answers: list[int] = []
        self.receipts = Receipts(self.memory, self.results.append)
        self.reader = FrameReader(self.receipts, "prefill-0", self.answers.append)

    def feed(self, raw: bytes, step: int = 1 << 20) -> None:
        """In pieces of at most `step` bytes."""
        left = Cursor([memoryview(raw)])
        while left.num_left:
            taken = self.reader.take(lambda targets: pour(targets, left.window(step)))
            assert taken > 0
            left.advance(taken)


def data(runs: list[tuple[int, int, int]], payload: bytes, part: int = 0, end: bytes = WHOLE) -> bytes:
    """A frame of move 1 of transfer t, epoch 1."""
    return header_bytes(Data("t", 1, 1, part, pack_runs(runs))) + payload + end


def whole_move(src: list[int], dst: list[int], mode_bytes: float) -> tuple[bytes, list[bytes], Sending]:
    """All frames of a move, as its sender would write them."""
    sending = Sending(send_move(1, "tcp://d:1", [src], [dst]), random_memory(LAYOUT, 40, 1), 0.0)
    frames = []
    while sending.num_layers_sent < len(sending.layers):
        layers = sending.batch(sending.num_computed(StepCounter(), 0.0), mode_bytes)
        for frame in sending.frames(layers):
            frames.append(frame.header + b"".join(map(bytes, frame.views)) + WHOLE)
            sending.num_units += frame.num_units
            sending.checksum += frame.checksum
        sending.num_layers_sent += len(layers)
    return b"".join(frames), frames, sending


@given(
    ids=st.lists(st.integers(1, 39), min_size=1, max_size=10, unique=True),
    step=st.integers(1, 5000),
    order=st.randoms(use_true_random=False),
    mode_bytes=st.sampled_from([0.0, 8000.0, float("inf")]),
)
@settings(deadline=None, max_examples=40)
def test_frames_in_any_order_and_any_pieces(ids: list[int], step: int, order: object, mode_bytes: float) -> None:
    """Cut anywhere, shuffled, some of them twice: each counts once, and the pool is as the sender's."""
    desk = Desk()
    desk.receipts.start(receive_move(4, [ids]))
    src = [40 - i for i in ids]
    _, frames, sending = whole_move(src, ids, mode_bytes)
    sequence = frames + frames[: len(frames) // 2]
    order.shuffle(sequence)  # type: ignore[attr-defined]
    desk.feed(b"".join(sequence), step)
    receipt = desk.receipts.of_move(4)
    assert receipt is not None
    receipt.expect(sending.num_units, sending.checksum)
    assert [(r.id, r.error, r.num_units) for r in desk.results] == [(4, None, 3 * len(ids))]
    assert desk.receipts.counts()["duplicate"] == len(frames) // 2
    for layer in range(3):
        np.testing.assert_array_equal(desk.memory.pools[layer][ids], sending.memory.pools[layer][src])


def test_large_messages_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into frames within the bounds of bytes and runs, which together are the message; a large unit goes alone."""
    ids = list(range(1, 38, 2))
    for max_bytes, max_runs in ((3 * ROOM, 1000), (100 * ROOM, 4), (ROOM // 2, 1000)):
        monkeypatch.setattr(sending_module, "MAX_FRAME_BYTES", max_bytes)
        monkeypatch.setattr(sending_module, "MAX_RUNS", max_runs)
        desk = Desk()
        desk.receipts.start(receive_move(4, [ids]))
        raw, _, sending = whole_move(ids, ids, float("inf"))
        for frame in Sending(sending.move, sending.memory, 0.0).frames([0, 1, 2]):
            assert frame.num_bytes <= max_bytes or frame.num_units == 1
            assert frame.num_units <= max_runs
        desk.feed(raw)
        receipt = desk.receipts.of_move(4)
        assert receipt is not None
        receipt.expect(3 * len(ids), sending.checksum)
        assert [r.error for r in desk.results] == [None]


@given(raw=st.binary(min_size=1, max_size=400), step=st.integers(1, 100))
@settings(deadline=None)
def test_garbage_is_refused_or_read_away(raw: bytes, step: int) -> None:
    """No bytes make the reader do anything but follow them or raise ProtocolError; the pool stays as it is."""
    desk = Desk()
    desk.receipts.start(receive_move(4, [[1, 2]]))
    with contextlib.suppress(ProtocolError):
        desk.feed(raw, step)
    for pool, before in zip(desk.memory.pools, random_memory(LAYOUT, 40, 2).pools, strict=True):
        np.testing.assert_array_equal(pool, before)


@pytest.mark.parametrize(
    "raw",
    [
        LENGTH.pack(0),
        LENGTH.pack(MAX_HEADER_BYTES + 1),
        LENGTH.pack(0xFFFFFFFF),
        LENGTH.pack(3) + b"\xc1\xc1\xc1",
        LENGTH.pack(64) + b"\x91" * 64,  # nested
        data([], b""),
        data([(9, 1, 1)], b""),
        data([(-1, 1, 1)], b""),
        data([(0, -5, 1)], b""),
        data([(0, 1, 0)], b""),
        data([(0, 1, 2**31 - 1)], b""),
        data([(0, 1, 2**31 - 1)] * 1000, b""),
        data([(0, 1, 1)], bytes(ROOM), end=b"\x07"),
        header_bytes(Ping(3, 10)) + bytes(10) + b"x",
    ],
    ids=range(14),
)
def test_what_cannot_be_followed_is_a_protocol_error(raw: bytes) -> None:
    desk = Desk()
    with pytest.raises(ProtocolError):
        desk.feed(raw)


def test_numbers_out_of_range_are_protocol_errors() -> None:
    for bad in (
        ["data", "t" * 300, 1, 1, 0, b"x" * 12],
        ["data", "t", -1, 1, 0, b"x" * 12],
        ["data", "t", 1 << 63, 1, 0, b"x" * 12],
        ["data", "t", 1, 1, 0, b"x" * 13],
        ["ping", 1, 1 << 40],
        ["ping", -1, 1],
        {"data": 1},
    ):
        body = streams.msgspec.msgpack.encode(bad)
        with pytest.raises(ProtocolError):
            Desk().feed(LENGTH.pack(len(body)) + body)


def test_a_frame_on_two_connections_counts_once() -> None:
    """Both copies are under way before either has ended."""
    desk = Desk()
    desk.receipts.start(receive_move(4, [[1]]))
    raw = data([(0, 1, 1)], b"\x01" * ROOM)
    second = FrameReader(desk.receipts, "prefill-0", desk.answers.append)
    first, desk.reader = desk.reader, second
    desk.feed(raw[:-100])
    desk.reader = first
    desk.feed(raw)
    desk.reader = second
    desk.feed(raw[-100:])
    receipt = desk.receipts.of_move(4)
    assert receipt is not None
    assert receipt.num_units == 1
    assert desk.receipts.counts() == {"whole": 1, "uncounted": 1}


def test_abandoned_frames_do_not_count() -> None:
    desk = Desk()
    desk.receipts.start(receive_move(4, [[1]]))
    desk.feed(data([(0, 1, 1)], bytes(ROOM), end=ABANDONED))
    desk.feed(data([(0, 1, 1)], b"\x01" * ROOM, part=1))
    receipt = desk.receipts.of_move(4)
    assert receipt is not None
    assert receipt.num_units == 1
    assert desk.receipts.counts() == {"abandoned": 1, "whole": 1}


def test_a_receipt_that_ends_in_a_frame_gets_none_of_its_rest() -> None:
    desk = Desk()
    desk.receipts.start(receive_move(4, [[1]]))
    raw = data([(0, 1, 1)], b"\x01" * ROOM)
    head = len(raw) - ROOM - 1
    desk.feed(raw[: head + 100])
    receipt = desk.receipts.of_move(4)
    assert receipt is not None
    receipt.fail("cancelled")
    assert [r.error for r in desk.results] == ["cancelled"]
    desk.memory.pools[0][1] = 0x55
    desk.feed(raw[head + 100 :] + data([(0, 1, 1)], b"\x01" * ROOM, part=1))
    assert (desk.memory.pools[0][1] == 0x55).all()
    assert desk.receipts.counts() == {"late": 1, "unknown": 1}


def test_a_sender_that_repeats_without_end_is_told_off() -> None:
    desk = Desk()
    desk.receipts.start(receive_move(4, [[1]]))
    for part in range(13):
        desk.feed(data([(0, 1, 1)], bytes(ROOM), part=part))
    assert len(desk.results) == 1
    assert "too much came" in str(desk.results[0].error)


def test_a_cancel_while_a_slice_is_copied_does_not_wait() -> None:
    """The result comes when the slice is done, by the copying thread; the canceller is back at once."""
    desk = Desk()
    desk.receipts.start(receive_move(4, [[1]]))
    raw = data([(0, 1, 1)], b"\x01" * ROOM)
    desk.feed(raw[: len(raw) - ROOM - 1])
    copying, go_on = threading.Event(), threading.Event()

    def slow(targets: list[memoryview]) -> int:
        copying.set()
        assert go_on.wait(20)
        targets[0][:1] = b"\x01"
        return 1

    thread = threading.Thread(target=desk.reader.take, args=(slow,))
    thread.start()
    assert copying.wait(20)
    receipt = desk.receipts.of_move(4)
    assert receipt is not None
    receipt.fail("cancelled")
    assert desk.results == []
    go_on.set()
    thread.join(20)
    assert [r.error for r in desk.results] == ["cancelled"]


def test_complete_is_complete() -> None:
    """A cancel after the last byte was counted and the sum agreed changes nothing; one result."""
    desk = Desk()
    desk.receipts.start(receive_move(4, [[1]]))
    raw, _, sending = whole_move([5], [1], 0.0)
    desk.feed(raw)
    receipt = desk.receipts.of_move(4)
    assert receipt is not None
    receipt.expect(sending.num_units, sending.checksum)
    receipt.fail("cancelled")
    assert [r.error for r in desk.results] == [None]


def greet(dialler: Identity, listener: Identity) -> tuple[object, object]:
    """What each end makes of the other."""
    ends = socket.socketpair()
    made: list[object] = [None, None]

    def run(which: int) -> None:
        greeting = streams.Greeting(ends[which], (dialler, listener)[which], "tcp://d:1")
        try:
            made[which] = greeting.answer() if which else greeting.dial()
        except LinkError as error:
            made[which] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for end in ends:
        end.close()
    return made[0], made[1]


def test_greetings() -> None:
    """Both prove the secret; a stranger learns neither it nor the format; a refusal names both."""
    p, d = Identity("p0", "format-a", SECRET), Identity("d0", "format-a", SECRET)
    theirs, ours = greet(p, d)
    assert (theirs.name, ours.name) == ("d0", "p0")  # type: ignore[attr-defined]
    others = {"KV format": Identity("d0", "format-b", SECRET), "secret": Identity("d0", "format-a", b"x")}
    for reason, other in others.items():
        results = greet(p, other)
        for result in results:
            assert isinstance(result, LinkRefused)
            for part in ("p0", "d0", "tcp://d:1", reason):
                assert part in str(result)
            assert ("format-b" in str(result)) == (reason == "KV format")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "VERSION", 99)
    identity = Identity("p0", "f", SECRET)
    theirs, _ = greet(identity, identity)
    assert isinstance(theirs, LinkRefused)
    assert "protocol 99" in str(theirs)


@pytest.mark.parametrize("scheme", ["tcp", "shm"])
def test_garbage_on_the_socket_harms_nobody(scheme: str) -> None:
    """Strangers that say nothing, nonsense, huge lengths, or hang up: the listener lets the next peer in."""
    with pair(scheme, LAYOUT) as rig:
        ends = []
        for raw in (b"", b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 0xFFFFFFFF), struct.pack("<I", 5) + b"\xc1" * 5):
            if scheme == "tcp":
                end = socket.create_connection(("127.0.0.1", int(rig.address.rpartition(":")[2])), timeout=5)
            else:
                end = socket.socket(socket.AF_UNIX)
                end.connect(rig.address.removeprefix("shm://"))
            end.sendall(raw)
            ends.append(end)
        ids = [[1, 2]]
        rig.d.start(receive_move(1, ids))
        rig.p.start(send_move(1, rig.address, ids, ids))
        (sent,) = wait(rig.p)
        assert sent.error is None
        rig.d.expect(1, sent.num_units, sent.checksum)
        assert wait(rig.d)[0].error is None
        for end in ends:
            end.close()


@pytest.mark.parametrize("scheme", ["tcp", "shm"])
def test_a_greeted_peer_that_talks_nonsense_is_hung_up_on(scheme: str) -> None:
    """It holds the secret; its connection ends, others and the pool do not notice. Over shared memory it lies about how
    much is in the ring as well."""
    with pair(scheme, LAYOUT) as rig:
        identity = Identity("mad", LAYOUT.format, SECRET)
        for nonsense in (b"\xff" * 64, struct.pack("<Q", 1 << 40), struct.pack("<Q", 1 << 63)):
            if scheme == "tcp":
                end = socket.create_connection(("127.0.0.1", int(rig.address.rpartition(":")[2])), timeout=5)
            else:
                end = socket.socket(socket.AF_UNIX)
                end.connect(rig.address.removeprefix("shm://"))
            with end:
                streams.Greeting(end, identity, rig.address).dial()
                end.settimeout(20)
                end.sendall(nonsense)
                while True:  # the ring's descriptor, and then the end
                    try:
                        if not end.recv(4096):
                            break
                    except ConnectionError:
                        break
        rig.p.start(send_move(1, rig.address, [[1]], [[1]]))
        assert wait(rig.p)[0].error is None
