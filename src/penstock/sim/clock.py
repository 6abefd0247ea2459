"""Virtual time: events in order of (time, number), and random streams drawn from one seed. Knows no engine."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable


class VirtualClock:
    """The `Clock` door on virtual time: `now` jumps from event to event.

    Events of equal time run in the order in which they were asked for, so a run is a pure function of what was put in.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self.num_events = 0  # that have run
        self._now = start_s
        self._num_asked = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def now(self) -> float:
        """Seconds."""
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Run `callback` at `when`; a time that has passed means: after what is due now."""
        heapq.heappush(self._heap, (max(when, self._now), self._num_asked, callback))
        self._num_asked += 1

    def call_in(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.call_at(self._now + delay_s, callback)

    @property
    def next_s(self) -> float | None:
        """When the next event is due; None when nothing is to come."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Run the next event; False when there is none."""
        if not self._heap:
            return False
        self._now, _, callback = heapq.heappop(self._heap)
        self.num_events += 1
        callback()
        return True

    def run(self, max_events: int | None = None) -> bool:
        """Run until nothing is to come, or for so many events. True: nothing is to come."""
        while self._heap:
            if max_events is not None:
                if max_events <= 0:
                    return False
                max_events -= 1
            self.step()
        return True

    def run_until(self, when: float) -> None:
        """Run what is due up to `when`, that included; afterwards it is `when`."""
        while self._heap and self._heap[0][0] <= when:
            self.step()
        self._now = max(self._now, when)


def stream(seed: int, *names: object) -> random.Random:
    """A random stream of its own for each name under a seed: what one party draws does not shift what another does."""
    text = ":".join([str(seed), *map(str, names)])
    return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
