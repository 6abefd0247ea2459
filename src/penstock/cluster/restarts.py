"""When an engine that has died may start again. Pure: no clock, no process."""

from __future__ import annotations

from collections import defaultdict

WINDOW_S = 300.0  # restarts are counted over so long
FIRST_S = 0.25  # the wait after a first death; it doubles with every other one within the window
LONGEST_S = 30.0


class Restarts:
    """At most `max_restarts` of one engine within WINDOW_S: what dies at once each time must not go on for ever."""

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self._deaths_s: defaultdict[str, list[float]] = defaultdict(list)

    def wait_s(self, name: str, now: float) -> float | None:
        """The engine has just died: seconds until it is to start again; None: never."""
        recent = self._deaths_s[name] = [death_s for death_s in self._deaths_s[name] if now - death_s < WINDOW_S]
        if len(recent) >= self.max_restarts:
            return None
        recent.append(now)
        return float(min(FIRST_S * 2 ** (len(recent) - 1), LONGEST_S))
