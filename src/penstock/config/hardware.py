"""What the machine offers this process: cores, free memory, CPU features, GPUs, a compiler, a free port.

Reads /proc, /sys and the answers of small tools. Never imports torch, and never fails: what cannot be found out is
reported as absent. `root` lets tests show it another machine's files.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# Feature -> the flags of /proc/cpuinfo that all must be there (x86 names, then ARM's).
_FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f", "avx512bw", "avx512vl"),
    "vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_tile", "amx_bf16"),
    "amx_int8": ("amx_tile", "amx_int8"),
    "neon": ("asimd",),
    "bf16": ("bf16",),
    "sve": ("sve",),
}
_FAST_BF16 = frozenset(("avx512_bf16", "amx_bf16", "bf16"))


def has_rdma(root: Path = ROOT) -> bool:
    """Whether Linux shows a card that reads and writes other machines' memory."""
    cards = root / "sys/class/infiniband"
    return cards.is_dir() and any(cards.iterdir())


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    memory_total_bytes: int
    memory_free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use. Memory in bytes, cores as whole threads of execution (at least 1)."""

    num_cores: int  # min(affinity, cgroup quota rounded up)
    cores_note: str  # which of them decided
    cpu_name: str
    cpu_features: tuple[str, ...]  # of _FEATURES
    memory_total_bytes: int  # of the machine or the cgroup, whichever is less
    memory_free_bytes: int  # usable without swapping; page cache that can be dropped counts as free
    memory_note: str
    gpus: tuple[Gpu, ...]
    gpu_driver_present: bool  # a driver is loaded, even if its tool gave no answer
    compiler: str | None  # path of a C++ compiler
    native_built: bool = False  # the library of native kernels was compiled at install time

    @property
    def has_native_kernels(self) -> bool:
        """Native kernels can run here: they take bfloat16 models with or without instructions for bfloat16."""
        return self.native_built and "avx2" in self.cpu_features

    @property
    def has_fast_bf16(self) -> bool:
        """The CPU multiplies bfloat16 in hardware; elsewhere plain torch is faster in float32."""
        return bool(_FAST_BF16.intersection(self.cpu_features))

    @property
    def words(self) -> str:
        """One line for people: "2 cores of AMD EPYC (avx2, avx512), 22.6 GiB of 23.1 GiB free, no GPU"."""
        features = f" ({', '.join(self.cpu_features)})" if self.cpu_features else ""
        cores = "1 core" if self.num_cores == 1 else f"{self.num_cores} cores"
        gib = 1 << 30
        memory = f"{self.memory_free_bytes / gib:.1f} of {self.memory_total_bytes / gib:.1f} GiB free"
        gpus = ", ".join(gpu.name for gpu in self.gpus) or "no GPU"
        return f"{cores} of {self.cpu_name}{features}, {memory}, {gpus}"


def probe(root: Path = ROOT) -> Machine:
    """Look at the machine. Costs milliseconds, tens of them where there is an NVIDIA driver."""
    num_cores, cores_note = _cores(root)
    name, features = _cpu(root)
    total, free, memory_note = _memory(root)
    driver = (root / "proc/driver/nvidia/version").exists()
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return Machine(
        num_cores=num_cores,
        cores_note=cores_note,
        cpu_name=name,
        cpu_features=features,
        memory_total_bytes=total,
        memory_free_bytes=free,
        memory_note=memory_note,
        gpus=_gpus() if driver else (),
        gpu_driver_present=driver,
        compiler=compiler,
        native_built=importlib.util.find_spec("penstock._native") is not None,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """The first whole number of a text; None for "max", for nothing, and for cgroup v1's "no limit"."""
    words = text.split()
    if not words or not words[0].lstrip("-").isdigit():
        return None
    value = int(words[0])
    return value if 0 <= value < 1 << 60 else None


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's cgroup and its ancestors, innermost first, of one controller (v1 and v2)."""
    found: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3 or (parts[1] and controller not in parts[1].split(",")):
            continue
        top = root / "sys/fs/cgroup"
        if parts[1]:
            top = top / parts[1] if (top / parts[1]).is_dir() else top / controller
        elif (top / "unified").is_dir():
            top = top / "unified"
        inner = top / parts[2].lstrip("/")
        while inner != top and top in inner.parents:  # inside a container the host's path is not there
            if inner.is_dir():
                found.append(inner)
            inner = inner.parent
        if top.is_dir():
            found.append(top)
    return found


def _cores(root: Path) -> tuple[int, str]:
    if hasattr(os, "sched_getaffinity"):
        allowed, note = len(os.sched_getaffinity(0)), "cores this process may run on"
    else:
        allowed, note = os.cpu_count() or 1, "cores of this machine"
    for group in _cgroups(root, "cpu"):
        quota, period = _number(_read(group / "cpu.cfs_quota_us")), _number(_read(group / "cpu.cfs_period_us"))
        words = _read(group / "cpu.max").split()
        if len(words) == 2:
            quota, period = _number(words[0]), _number(words[1])
        if quota and period:
            cores = max(1, -(-quota // period))
            if cores < allowed:
                allowed, note = cores, f"cgroup quota of {quota / period:g} cores"
    return max(1, allowed), note


def _memory(root: Path) -> tuple[int, int, str]:
    """(total, free, note) in bytes."""
    fields = {
        parts[0].rstrip(":"): int(parts[1]) * 1024
        for line in _read(root / "proc/meminfo").splitlines()
        if len(parts := line.split()) >= 2 and parts[1].isdigit()
    }
    if fields:
        total, free = fields.get("MemTotal", 0), fields.get("MemAvailable", fields.get("MemFree", 0))
    else:
        total = free = _memory_elsewhere()
    note = "memory of this machine"
    for group in _cgroups(root, "memory"):
        limit = _number(_read(group / "memory.max") or _read(group / "memory.limit_in_bytes"))
        used = _number(_read(group / "memory.current") or _read(group / "memory.usage_in_bytes"))
        if limit is None or used is None:
            continue
        stat = dict(line.split()[:2] for line in _read(group / "memory.stat").splitlines() if " " in line)
        droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        left = max(0, limit - max(0, used - droppable))
        total = min(total, limit)
        if left < free:
            free, note = left, "limit of this cgroup"
    return total, free, note


def _memory_elsewhere() -> int:
    """Physical memory where there is no /proc (macOS); free memory is not told there, so half of it is assumed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 0


def _cpu(root: Path) -> tuple[str, tuple[str, ...]]:
    text = _read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    features = tuple(feature for feature, needed in _FEATURES.items() if present.issuperset(needed))
    return (name.group(1).strip() if name else platform.processor() or platform.machine()), features


def _gpus() -> tuple[Gpu, ...]:
    text = _answer("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 2)]
        if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
            gpus.append(Gpu(parts[0], int(parts[1]) << 20, int(parts[2]) << 20))
    if visible is not None:
        indices = [int(word) for word in visible.split(",") if word.strip().isdigit()]
        if indices or not visible.strip():  # names such as GPU-1a2b cannot be matched here; all are shown then
            gpus = [gpus[index] for index in indices if index < len(gpus)]
    return tuple(gpus)


def _answer(*command: str) -> str:
    """Standard output of a small tool; "" if it is missing, fails or takes over ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def port_holder(host: str, port: int, root: Path = ROOT) -> str | None:
    """Who holds a TCP port that cannot be bound: "python3 (process 123)" or "another program"; None if it is free.

    Binds the port for a moment, with the option uvicorn uses, so that connections in TIME_WAIT do not count.
    An address that is not ours raises OSError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return _listener(port, root) or "another program"
    return None


def _listener(port: int, root: Path) -> str | None:
    """The process that listens on a port, from /proc; None when it belongs to somebody else."""
    inodes = set()
    for table in ("proc/net/tcp", "proc/net/tcp6"):
        for line in _read(root / table).splitlines()[1:]:
            parts = line.split()
            if len(parts) > 9 and parts[3] == "0A" and int(parts[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{parts[9]}]")
    if not inodes:
        return None
    for process in (root / "proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link) in inodes:
                        return f"{_read(process / 'comm').strip()} (process {process.name})"
    return None


def platform_words() -> str:
    """Python and operating system in one line."""
    return f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {sys.executable}"
