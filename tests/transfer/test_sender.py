"""The sending thread over a stream that a test holds up at will."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from tests.transfer.rig import LAYOUTS, SECRET, random_memory, receive_move, send_move, wait_until

from penstock.core.moves import MoveResult
from penstock.transfer import local
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity, LinkError
from penstock.transfer.receipts import Receipts
from penstock.transfer.sender import Sender

LAYOUT = LAYOUTS["full"]
ADDRESS = "local://held-up"


class HeldUp:
    """`Outgoing` that takes small pieces, and while `free` is clear stays inside a write that reads the pool."""

    def __init__(self, inner: local.LocalOutgoing) -> None:
        self.replies, self.fileno, self.events, self.close = inner.replies, inner.fileno, inner.events, inner.close
        self._inner, self.recheck_s = inner, inner.recheck_s
        self.free, self.inside = threading.Event(), threading.Event()
        self.free.set()

    def write(self, views: list[memoryview]) -> int:
        if not self.free.is_set():
            self.inside.set()
            assert self.free.wait(20)
        return self._inner.write([views[0][:1000]])


class Bench:
    """A sender whose other end is in this process."""

    def __init__(self) -> None:
        self.results: list[MoveResult] = []
        self.arrived: list[MoveResult] = []
        self.receipts = Receipts(random_memory(LAYOUT, 40, 2), self.arrived.append)
        identity = Identity("x", LAYOUT.format, SECRET)
        local.listen(ADDRESS, identity, self.receipts)
        self.stream: HeldUp | None = None
        self.refusals = 0

        def dial() -> HeldUp:
            if self.refusals:
                self.refusals -= 1
                raise LinkError("not today")
            self.stream = HeldUp(local.dial(ADDRESS, identity))
            return self.stream

        self.memory = random_memory(LAYOUT, 40, 1)
        limits = {"mode": "coalesced", "throttle": None, "poll_s": 1e-3, "stall_s": 5.0}
        self.sender = Sender(ADDRESS, dial, self.memory, StepCounter(), self.results.append, **limits)  # type: ignore[arg-type]

    def connect(self) -> HeldUp:
        self.sender.add(send_move(1, ADDRESS, [[1]], [[1]]))
        wait_until(lambda: self.results)
        assert self.results.pop().error is None
        assert self.stream is not None
        return self.stream


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    try:
        yield made
    finally:
        if made.stream is not None:
            made.stream.free.set()
        made.sender.close()
        made.sender.join(20)
        local.leave(ADDRESS)


def test_a_cancel_never_ends_a_move_whose_memory_is_being_read(bench: Bench) -> None:
    """It returns at once; the result follows the write in progress; what is queued behind ends at once."""
    stream = bench.connect()
    bench.receipts.start(receive_move(2, [[1, 2, 3]], transfer_id="two"))
    stream.free.clear()
    bench.sender.add(send_move(2, ADDRESS, [[1, 2, 3]], [[1, 2, 3]], transfer_id="two"))
    bench.sender.add(send_move(3, ADDRESS, [[4]], [[4]]))
    assert stream.inside.wait(20)
    bench.sender.cancel(2)
    bench.sender.cancel(3)
    time.sleep(0.05)
    assert [(r.id, r.error) for r in bench.results] == [(3, "cancelled")]
    stream.free.set()
    wait_until(lambda: len(bench.results) == 2)
    assert (bench.results[1].id, bench.results[1].error) == (2, "cancelled")
    bench.sender.add(send_move(4, ADDRESS, [[9]], [[9]]))
    wait_until(lambda: len(bench.results) == 3)
    assert bench.results[2].error is None
    assert bench.receipts.counts()["abandoned"] == 1
    receipt = bench.receipts.of_move(2)
    assert receipt is not None
    assert receipt.num_units == 0


def test_it_connects_again(bench: Bench) -> None:
    """Moves that meet a failure end with its text; the next one tries anew."""
    bench.refusals = 2
    for n in range(2):
        bench.sender.add(send_move(n, ADDRESS, [[1]], [[1]]))
        wait_until(lambda: bench.results)
        assert "not today" in str(bench.results.pop().error)
    assert bench.sender.is_lost
    bench.connect()
    assert not bench.sender.is_lost
    assert bench.sender.stats().num_failed == 2
    assert bench.sender.stats().num_connections == 1


def test_after_close_nothing_is_sent(bench: Bench) -> None:
    bench.connect()
    bench.sender.close()
    bench.sender.add(send_move(2, ADDRESS, [[1]], [[1]]))
    assert "closed" in str(bench.results.pop().error)
