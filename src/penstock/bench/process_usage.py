"""What a running process has used so far, from Linux's /proc: peak resident memory and processor time.

Elsewhere there is nothing to tell, and benchmarks leave these figures out.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    """peak_mb: the most resident memory at any time, in 2^20 bytes. cpu_s: user and system seconds of all threads."""

    peak_mb: float
    cpu_s: float


def usage(pid: int) -> Usage | None:
    """Of a process; None where there is no /proc or no such process, or one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    peaks_kb = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    if not peaks_kb:
        return None
    return Usage(peaks_kb[0] / 1024, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


def children(pid: int) -> list[tuple[int, str]]:
    """(process id, "engine" or "template worker") of a server's processes."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text(encoding="ascii").split()):
                command = Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8")
                found.append((child, "engine" if "penstock.build.engine" in command else "template worker"))
    return found
