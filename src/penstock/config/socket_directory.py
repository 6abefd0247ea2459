"""Private directories for socket files, and an end to those whose owner was killed. Knows files, no sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile

PREFIX = "penstock-"
MEMORY = "/dev/shm"
OWNER = "owner"


class SocketDirectory:
    """A directory that only this user can enter, with a short path: socket files may have 107 characters.

    Its file "owner" is locked as long as this process lives, however it ends: who makes the next directory removes
    those that nobody owns any more. (A lock, not a process id: ids are used again, and containers may share the place.)
    """

    def __init__(self) -> None:
        # In memory where the system has such a place: a KV arena that engines share is a file here.
        place = MEMORY if os.access(MEMORY, os.W_OK) else tempfile.gettempdir()
        remove_stale(place)
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        unnamed = os.path.join(self.path, f".{OWNER}")
        self._owner: int | None = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        os.rename(unnamed, os.path.join(self.path, OWNER))  # seen by others only once it is locked

    def close(self) -> None:
        """Remove it and all that is in it. Safe to call twice."""
        if self._owner is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._owner)
            self._owner = None


def remove_stale(place: str) -> int:
    """Remove the socket directories in `place` that nobody owns any more; how many. What is not ours stays."""
    num_removed = 0
    for name in os.listdir(place):
        if not name.startswith(PREFIX):
            continue
        path = os.path.join(place, name)
        try:
            owner = os.open(os.path.join(path, OWNER), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # none of these directories, or another user's
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                num_removed += 1
        finally:
            os.close(owner)
    return num_removed
