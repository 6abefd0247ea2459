"""A network slower than this machine's memory, pretended: a token bucket. Knows bytes and seconds, reads no clock."""

from __future__ import annotations

import threading


class TokenBucket:
    """Lets `bytes_per_s` through on average, and up to `burst_bytes` at once after a pause. Any thread may ask.

    One bucket given to several links is one network card under all of them.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float | None = None) -> None:
        """`burst_bytes`: None means 2 ms' worth, as much as a sleep may come late."""
        if bytes_per_s <= 0 or (burst_bytes is not None and burst_bytes <= 0):
            raise ValueError("a token bucket needs a rate and a burst above 0")
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = bytes_per_s * 2e-3 if burst_bytes is None else burst_bytes
        self._full_at = float("-inf")  # when the bucket would be full again
        self._lock = threading.Lock()

    def take(self, num_bytes: int, now: float) -> float:
        """Take what is sent at `now`; seconds to wait before sending any more (0: go on)."""
        with self._lock:
            self._full_at = max(self._full_at, now) + num_bytes / self.bytes_per_s
            return max(0.0, self._full_at - now - self.burst_bytes / self.bytes_per_s)
