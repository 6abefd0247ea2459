"""An engine's beats on their way to its front end: a byte each through a pipe, from a thread beside the engine's loop.

A pipe takes no lock that the loop holds and lives as long as both processes. When a beat is due says `beats.py`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from penstock.cluster.beats import BEAT_S, Pulse

MAX_UNREAD = 4096  # beats taken at once: more than a pipe is asked to hold


class BeatReader:
    """The front end's end. `writer` is for the engine's process to inherit, and to be closed here then."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(self.writer, False)
        self._file = os.fdopen(reader, "rb", 0)

    def heard(self) -> bool:
        """Whether a beat has come since the last call."""
        return not self._file.closed and bool(self._file.read(MAX_UNREAD))

    def close(self) -> None:
        self._file.close()


def beating(writer: int, mark: Callable[[], int]) -> threading.Thread:
    """A thread that beats into the pipe for as long as this process lives. `mark`: see Pulse.

    It wakes while the loop is inside a native call, for those let go of the interpreter; what it does takes 10 us.
    """

    def beat() -> None:
        pulse = Pulse(time.monotonic())
        while True:
            if pulse.beats(mark(), time.monotonic()):
                try:
                    with contextlib.suppress(BlockingIOError):  # nobody reads: there are beats enough in it
                        os.write(writer, b".")
                except OSError:
                    return  # the front end is gone
            time.sleep(BEAT_S)

    thread = threading.Thread(target=beat, name="penstock-beats", daemon=True)
    thread.start()
    return thread
