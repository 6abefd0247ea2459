"""The sending end: one thread per peer, which sends layers of moves as the step counter passes them.

Knows memory, counters and streams. Does not know which link carries a stream, nor why anything moves.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from penstock.core.moves import KVMove, MoveResult
from penstock.transfer.coalesce import LinkCost
from penstock.transfer.counter import StepCounter
from penstock.transfer.cursor import Cursor
from penstock.transfer.frames import ABANDONED, MAX_PING_BYTES, WHOLE, LinkError, Ping, header_bytes
from penstock.transfer.memory import MASK, KVMemory
from penstock.transfer.sending import Sending
from penstock.transfer.streams import Outgoing
from penstock.transfer.throttle import TokenBucket

log = logging.getLogger("penstock.transfer")

MODES = ("coalesced", "layerwise", "whole")
SLICE_BYTES = 1 << 20  # offered to a stream at once
PINGS = 8
PROBE_S = 5e-3  # a bandwidth is believed when it was measured for so long, or over MAX_PING_BYTES
WINDOW_BYTES = 32 << 20  # sent without a pause before the bandwidth is corrected: several times what buffers swallow
_filler = memoryview(bytes(SLICE_BYTES))


def _fill(num_bytes: int) -> list[memoryview]:
    """Bytes of no meaning."""
    whole, rest = divmod(num_bytes, SLICE_BYTES)
    return [_filler] * whole + [_filler[:rest]]


@dataclass(slots=True)
class PeerStats:
    """What one peer was sent. Seconds are those of writing, throttling included, summed over moves."""

    num_bytes: int = 0
    num_messages: int = 0
    num_moves: int = 0  # that ended well
    num_failed: int = 0
    num_connections: int = 0
    busy_s: float = 0.0
    overlappable_s: float = 0.0  # of busy_s, for moves that followed a step
    exposed_s: float = 0.0  # of such moves: from their last layer's end to the end of sending
    cost: LinkCost | None = None  # of the last connection, as measured

    @property
    def gigabytes_per_s(self) -> float:
        return self.num_bytes / self.busy_s / 1e9 if self.busy_s else 0.0

    @property
    def overlap_ratio(self) -> float:
        """Share of the sending that took place while steps computed, of moves that followed one."""
        return max(0.0, 1.0 - self.exposed_s / self.overlappable_s) if self.overlappable_s else 0.0


class Sender:
    """Everything that goes to one peer. Connects when there is something to send, again after a failure.

    `add`, `cancel` and `close` wait for nobody. A peer that takes nothing for `stall_s` counts as gone; what was on its
    way to it ends with an error that names it.
    """

    def __init__(
        self,
        address: str,
        dial: Callable[[], Outgoing],
        memory: KVMemory,
        counter: StepCounter,
        post: Callable[[MoveResult], None],
        *,
        mode: str,
        throttle: TokenBucket | None,
        poll_s: float,
        stall_s: float,
    ) -> None:
        self.address, self._dial, self._memory, self._counter, self._post = address, dial, memory, counter, post
        self._mode, self._throttle, self._poll_s, self._stall_s = mode, throttle, poll_s, stall_s
        self._stream: Outgoing | None = None
        self._cost = LinkCost(1e9, 1e-4)
        self._lock = threading.Lock()  # of what follows; never held while anything waits
        self._sendings: list[Sending] = []  # in the order they were added
        self._current: Sending | None = None  # its pool memory may be being read
        self._stats = PeerStats()
        self._closing = False
        self._was_lost = False
        self._wake, self._waker = socket.socketpair()
        self._wake.setblocking(False)
        self._waker.setblocking(False)
        self._window_bytes, self._window_messages, self._window_s = 0, 0, 0.0
        self._paid = 0  # bytes that the token bucket lets through
        self._thread = threading.Thread(target=self._run, name=f"send {address}", daemon=True)
        self._thread.start()

    def add(self, move: KVMove) -> None:
        sending = Sending(move, self._memory, time.monotonic())
        with self._lock:
            self._sendings.append(sending)
            if not sending.layers:
                self._end(sending, None)
            elif self._closing:
                self._end(sending, f"the link to {self.address} is closed")
        self._rouse()

    def cancel(self, move_id: int) -> None:
        """At once if none of it is being written; else as soon as the write in progress, of a slice, returns."""
        with self._lock:
            for sending in self._sendings:
                if sending.move.id == move_id:
                    sending.cancelled = True
                    if sending is not self._current:
                        self._end(sending, "cancelled")
                    break
        self._rouse()

    @property
    def is_lost(self) -> bool:
        """It has no connection any more and nothing to send."""
        with self._lock:
            return self._was_lost and not self._sendings

    def stats(self) -> PeerStats:
        with self._lock:
            return replace(self._stats, cost=replace(self._cost) if self._stats.cost else None)

    def close(self) -> None:
        """End all moves with an error. `join` waits for the thread."""
        with self._lock:
            self._closing = True
            for sending in list(self._sendings):
                sending.cancelled = True
                if sending is not self._current:
                    self._end(sending, f"the link to {self.address} is closed")
        self._rouse()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _rouse(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake up; closed: it needs not
            self._waker.send(b"\0")

    def _end(self, sending: Sending, error: str | None) -> None:
        """With the lock held. Once per sending; further calls do nothing."""
        if sending.ended:
            return
        sending.ended = True
        self._sendings.remove(sending)
        now, stats = time.monotonic(), self._stats
        stats.num_failed += error is not None
        stats.num_moves += error is None
        stats.busy_s += sending.busy_s
        if sending.move.after_step >= 0 and error is None and sending.computed_at is not None:
            stats.overlappable_s += sending.busy_s
            stats.exposed_s += now - sending.computed_at
        sizes = (sending.num_units, sending.num_bytes, sending.checksum)
        self._post(MoveResult(sending.move.id, error, *sizes, now - sending.begin))

    # What follows runs in the thread.

    def _run(self) -> None:
        while self._await_moves():
            try:
                if self._stream is None:
                    self._connect()
                self._turn()
            except (LinkError, OSError, EOFError) as error:
                self._lose(str(error) or type(error).__name__)
        if self._stream is not None:
            self._stream.close()
        self._wake.close()
        self._waker.close()

    def _await_moves(self) -> bool:
        """Until there is something to do; False: no more, ever."""
        while True:
            with self._lock:
                if self._closing:
                    return False
                if self._sendings:
                    return True
            self._window_bytes, self._window_messages, self._window_s = 0, 0, 0.0
            try:
                self._wait(None, writing=False)
                if self._stream is not None:
                    self._stream.replies()
            except (LinkError, OSError, EOFError) as error:
                self._lose(str(error))

    def _lose(self, reason: str) -> None:
        """The connection is gone, and with it what was to go over it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        with self._lock:
            self._current = None
            self._was_lost = True
            if self._sendings:
                log.warning("link to %s: %s", self.address, reason)
            for sending in list(self._sendings):
                self._end(sending, "cancelled" if sending.cancelled else f"{self.address}: {reason}")

    def _connect(self) -> None:
        self._stream = self._dial()
        message_s = min(self._ping(0) for _ in range(PINGS))
        num_bytes = 256 << 10
        seconds = self._ping(num_bytes)
        while seconds - message_s < PROBE_S and num_bytes < MAX_PING_BYTES:
            num_bytes *= 4
            seconds = self._ping(num_bytes)
        seconds = min(seconds, self._ping(num_bytes))
        with self._lock:
            self._cost = LinkCost(num_bytes / max(seconds - message_s, 1e-9), message_s / 2)
            self._stats.cost = self._cost
            self._was_lost = False
            self._stats.num_connections += 1
        log.debug("link to %s: %.2f GB/s, %.0f us", self.address, self._cost.bytes_per_s / 1e9, 5e5 * message_s)

    def _ping(self, num_bytes: int) -> float:
        """Seconds until so many bytes were answered."""
        assert self._stream is not None
        begin = time.monotonic()
        head = memoryview(header_bytes(Ping(0, num_bytes)))
        self._write(Cursor([head, *_fill(num_bytes), memoryview(WHOLE)]), None)
        while not self._stream.replies():
            self._wait(begin + self._stall_s - time.monotonic(), writing=False)
            if self._closing or time.monotonic() - begin > self._stall_s:
                raise LinkError(f"no answer within {self._stall_s:g} s")
        return time.monotonic() - begin

    def _turn(self) -> None:
        """Send one message, or wait a moment for a layer."""
        assert self._stream is not None
        now = time.monotonic()
        min_bytes = {"layerwise": 0.0, "whole": float("inf")}.get(self._mode, self._cost.min_message_bytes)
        with self._lock:
            sendings = list(self._sendings)
        for sending in sendings:
            layers = sending.batch(sending.num_computed(self._counter, now), min_bytes)
            if layers:
                self._send(sending, layers)
                return
        self._window_bytes, self._window_messages, self._window_s = 0, 0, 0.0
        self._stream.replies()  # notices a peer that has gone
        time.sleep(self._poll_s)

    def _send(self, sending: Sending, layers: list[int]) -> None:
        for frame in sending.frames(layers):
            with self._lock:
                if sending.ended:
                    return
                self._current = sending
            begin = time.monotonic()
            head, last = memoryview(frame.header), memoryview(WHOLE)
            whole = self._write(Cursor([head, *frame.views, last]), sending, len(head))
            seconds = time.monotonic() - begin
            with self._lock:
                self._current = None
                sending.busy_s += seconds
                if whole:
                    sending.num_units += frame.num_units
                    sending.num_bytes += frame.num_bytes
                    sending.checksum = (sending.checksum + frame.checksum) & MASK
                    self._stats.num_bytes += frame.num_bytes
                    self._stats.num_messages += 1
                if sending.cancelled:
                    self._end(sending, "cancelled")
                    return
            self._watch(frame.num_bytes, seconds)
        sending.num_layers_sent += len(layers)
        if sending.num_layers_sent == len(sending.layers):
            with self._lock:
                self._end(sending, None)

    def _watch(self, num_bytes: int, seconds: float) -> None:
        """Correct the bandwidth by what was sent without a pause."""
        self._window_bytes += num_bytes
        self._window_messages += 1
        self._window_s += seconds
        if self._window_bytes >= WINDOW_BYTES:
            with self._lock:
                self._cost.observe(self._window_bytes, self._window_messages, self._window_s)
            self._window_bytes, self._window_messages, self._window_s = 0, 0, 0.0

    def _write(self, cursor: Cursor, sending: Sending | None, head_bytes: int = 0) -> bool:
        """Write a frame to its end; False: its sending was cancelled, and what follows is filler that says so."""
        assert self._stream is not None
        total = cursor.num_left
        progress = time.monotonic()
        whole = True
        while cursor.num_left:
            if whole and sending is not None and sending.cancelled and cursor.num_left > 1:
                whole = False
                if cursor.num_left == total:
                    return False
                # The frame must have its length, or the receiver could not find the next one.
                head_left = max(0, cursor.num_left - (total - head_bytes))
                head = [bytes(view) for view in cursor.window(head_left)]
                rest = cursor.num_left - head_left - 1
                cursor = Cursor([*(memoryview(piece) for piece in head), *_fill(rest), memoryview(ABANDONED)])
                with self._lock:
                    self._end(sending, "cancelled")
            if self._throttle is not None and not self._paid:
                self._paid = min(cursor.num_left, max(4096, min(int(self._throttle.bytes_per_s * 1e-3), SLICE_BYTES)))
                self._pause(self._throttle.take(self._paid, time.monotonic()))
                progress = time.monotonic()
                continue  # it may have been cancelled meanwhile
            taken = self._stream.write(cursor.window(self._paid or SLICE_BYTES))
            now = time.monotonic()
            if taken:
                cursor.advance(taken)
                self._paid = max(0, self._paid - taken)
                progress = now
            elif self._closing:
                raise LinkError("closed")
            elif now - progress > self._stall_s:
                raise LinkError(f"has taken nothing for {self._stall_s:g} s")
            else:
                self._wait(self._stall_s, writing=True)
                self._stream.replies()
        return whole

    def _pause(self, seconds: float) -> None:
        """As long, unless somebody rouses this thread; exact, where waiting for a descriptor counts milliseconds."""
        if seconds > 5e-3:
            self._wait(seconds, writing=None)
        elif seconds > 0:
            time.sleep(seconds)

    def _wait(self, timeout_s: float | None, writing: bool | None) -> None:
        """Until somebody rouses this thread, the time is over or, unless `writing` is None, the stream stirs or is to
        be asked again."""
        recheck_s = None if self._stream is None or writing is None else self._stream.recheck_s()
        if recheck_s is not None:
            time.sleep(recheck_s)
            timeout_s = 0.0
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._stream is not None and writing is not None and self._stream.fileno() >= 0:
            poll.register(self._stream.fileno(), self._stream.events(writing))
        poll.poll(None if timeout_s is None else max(0.0, 1000 * timeout_s))
        try:
            while self._wake.recv(4096):
                pass
        except BlockingIOError:
            pass
