"""Other machines' /proc and /sys, shown to the probe; and this one's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.config.hardware import port_holder, probe

MEMINFO = "MemTotal:       16000000 kB\nMemFree: 100 kB\nMemAvailable:   8000000 kB\n"
CPUINFO = """processor\t: 0
model name\t: Example CPU @ 2 GHz
flags\t\t: fpu avx2 avx512f avx512bw avx512vl avx512_vnni amx_tile amx_bf16

processor\t: 1
model name\t: Example CPU @ 2 GHz
"""


def machine_files(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/cpuinfo": CPUINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    machine = probe(machine_files(tmp_path))
    assert machine.memory_total_bytes == 16_000_000 * 1024
    assert machine.memory_free_bytes == 8_000_000 * 1024
    assert machine.num_cores == len(os.sched_getaffinity(0))
    assert machine.cpu_name == "Example CPU @ 2 GHz"
    assert machine.cpu_features == ("avx2", "avx512", "vnni", "amx_bf16")
    assert machine.has_fast_bf16
    assert machine.gpus == ()
    assert "Example CPU" in machine.words
    assert "7.6 of 15.3 GiB free" in machine.words


def test_version_2_cgroups_limit_memory_and_cores(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user/inner\n",
        "sys/fs/cgroup/user/inner/memory.max": "max\n",
        "sys/fs/cgroup/user/inner/memory.current": "1000\n",
        "sys/fs/cgroup/user/memory.max": str(4 << 30),
        "sys/fs/cgroup/user/memory.current": str(3 << 30),
        "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {1 << 30}\n",
        "sys/fs/cgroup/user/cpu.max": "50000 100000\n",
    }
    machine = probe(machine_files(tmp_path, **files))
    assert machine.memory_total_bytes == 4 << 30
    assert machine.memory_free_bytes == 2 << 30  # what is used, less the page cache that can be dropped
    assert machine.memory_note == "limit of this cgroup"
    assert machine.num_cores == 1
    if len(os.sched_getaffinity(0)) > 1:
        assert machine.cores_note == "cgroup quota of 0.5 cores"


def test_version_1_cgroups_inside_a_container(tmp_path: Path) -> None:
    """The path in /proc/self/cgroup is the host's and is not there; the limits stand at the top."""
    files = {
        "proc/self/cgroup": "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(1 << 30),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(1 << 28),
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {1 << 27}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    machine = probe(machine_files(tmp_path, **files))
    assert machine.memory_free_bytes == (1 << 30) - (1 << 27)
    assert machine.num_cores == len(os.sched_getaffinity(0))
    unlimited = {**files, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}
    assert probe(machine_files(tmp_path, **unlimited)).memory_free_bytes == 8_000_000 * 1024


def test_nothing_readable_is_no_failure(tmp_path: Path) -> None:
    machine = probe(tmp_path)
    assert machine.num_cores >= 1
    assert machine.cpu_features == ()
    assert not machine.has_fast_bf16
    assert machine.words


def test_this_machine() -> None:
    machine = probe()
    assert 0 < machine.memory_free_bytes <= machine.memory_total_bytes
    assert 1 <= machine.num_cores <= (os.cpu_count() or 1)


def test_a_port_in_use_names_its_holder() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        holder = port_holder("127.0.0.1", port)
        assert holder is not None
        if sys.platform == "linux":
            assert f"(process {os.getpid()})" in holder
    assert port_holder("127.0.0.1", port) is None
    with pytest.raises(OSError, match="assign"):
        port_holder("203.0.113.7", port)


def test_probing_imports_no_torch() -> None:
    code = "import sys, penstock.config.hardware as h; h.probe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
