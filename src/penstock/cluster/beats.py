"""Whether an engine still goes on: what it says of itself four times a second, and for how long it has said nothing.

A *beat* says that the engine's process runs, and that its loop went round or a layer was computed not long ago. So a
process that is stopped falls silent at once, a call that never returns after STUCK_S; a step may take as long as it
likes while layers of it are done. Pure: no clock, thread or pipe (`beat_pipe.py` has them).
"""

from __future__ import annotations

from collections.abc import Iterable, Set

BEAT_S = 0.25  # between beats
STUCK_S = 60.0  # one layer never takes so long
MAX_LOOK_S = 1.0  # of silence counted between two looks: who did not look has not listened either


class Pulse:
    """An engine's side. `mark`: any number that changes as the engine goes on."""

    def __init__(self, now: float, stuck_s: float = STUCK_S) -> None:
        self.stuck_s = stuck_s
        self._mark: int | None = None
        self._since_s = now

    def beats(self, mark: int, now: float) -> bool:
        """Is a beat to be sent now?"""
        if mark != self._mark:
            self._mark, self._since_s = mark, now
        return now - self._since_s < self.stuck_s


class Silences:
    """The router's side: engines that have said nothing for `limit_s` are held to be dead. 0: none ever is.

    Only time in which somebody listens counts: a front end that was stopped itself, or starved, blames nobody.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._silent_s: dict[str, float] = {}
        self._looked_s: float | None = None

    def look(self, engines: Iterable[str], heard: Set[str], now: float) -> list[str]:
        """Who of these engines is silent for too long. `heard`: who has beaten since the last look."""
        passed_s = 0.0 if self._looked_s is None else min(now - self._looked_s, MAX_LOOK_S)
        self._looked_s = now
        before, self._silent_s = self._silent_s, {}
        for name in engines:
            self._silent_s[name] = 0.0 if name in heard or name not in before else before[name] + passed_s
        return [name for name, silent_s in self._silent_s.items() if silent_s > self.limit_s > 0]
