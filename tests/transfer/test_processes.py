"""Links between two processes, one of which is killed or stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.transfer import rig as rigs
from tests.transfer.rig import EXTRAS, pair, random_memory, receive_move, send_move, wait, wait_until
from tests.transfer.test_links import BIG

from penstock.transfer.throttle import TokenBucket

ROOT = Path(__file__).resolve().parents[2]
LISTEN = {**rigs.LISTEN, "shm": "shm://{directory}/link"}
IDS = [list(range(1, 65))]
links = pytest.mark.parametrize("scheme", ["tcp", "shm", *EXTRAS])


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `peer_process.py`; it is gone at the end, whatever happened to it."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/transfer/peer_process.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def rings() -> list[str]:
    """Shared memory that has a name; directories there belong to servers that may run beside the tests."""
    place = Path("/dev/shm")
    found = place.iterdir() if place.is_dir() else ()
    return [path.name for path in found if "penstock" in path.name and path.is_file()]


@links
def test_a_killed_receiver_ends_the_move(scheme: str, tmp_path: Path) -> None:
    """kill -9 in the middle of a slow transfer: an error that names it, soon; no shared memory is left; the next move
    says that nobody is there."""
    with (
        pair(scheme, BIG, 80, throttle=TokenBucket(8e6)) as rig,
        child("receive", LISTEN[scheme].format(directory=tmp_path)) as process,
    ):
        address = address_of(process)
        rig.p.start(send_move(1, address, IDS, IDS))
        rig.p.start(send_move(2, address, IDS, IDS, after_step=7))
        wait_until(lambda: rig.p.stats()[address].num_connections == 1)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        results = wait(rig.p, 2)
        assert sorted(r.id for r in results) == [1, 2]
        assert all(r.error and address in r.error for r in results)
        assert rings() == []
        rig.p.start(send_move(3, address, IDS, IDS))
        (sent,) = wait(rig.p)
        assert sent.error is not None
        assert "cannot reach" in sent.error
        if scheme == "shm":  # the address of a killed process can be taken again
            with child("receive", address) as second:
                assert address_of(second) == address


@links
def test_a_killed_sender_leaves_a_receipt_that_can_be_cancelled(scheme: str) -> None:
    """Half of it has come: no result until D decides; then nothing more is written, and other peers go on."""
    with pair(scheme, BIG, 80) as rig:
        rig.d.start(receive_move(1, IDS))
        with child("send", rig.address, "8") as process:
            source = random_memory(BIG, 80, 1)
            wait_until(lambda: (rig.d_memory.pools[0][1] == source.pools[0][1]).all())
            os.kill(process.pid, signal.SIGKILL)
            process.wait(20)
        rig.d.start(receive_move(2, [[70]], transfer_id="other"))
        rig.p.start(send_move(2, rig.address, [[70]], [[70]], transfer_id="other"))
        (sent,) = wait(rig.p)
        rig.d.expect(2, sent.num_units, sent.checksum)
        assert [(r.id, r.error) for r in wait(rig.d)] == [(2, None)]
        rig.d.cancel(1)
        assert [(r.id, r.error) for r in wait(rig.d)] == [(1, "cancelled")]
        assert rings() == []


@links
def test_a_stopped_receiver(scheme: str, tmp_path: Path) -> None:
    """SIGSTOP: sending halts, a cancel still ends at once and frees the blocks, another move to it ends by time-out,
    other peers are served meanwhile; after SIGCONT the address works again."""
    with (
        pair(scheme, BIG, 80, stall_s=5.0, mode="whole") as rig,
        child("receive", LISTEN[scheme].format(directory=tmp_path)) as process,
    ):
        address = address_of(process)
        rig.p.start(send_move(1, address, [[1]], [[1]]))
        assert wait(rig.p)[0].error is None
        os.kill(process.pid, signal.SIGSTOP)
        try:
            for n in range(2, 10):  # 4 MiB each: more than any buffer holds
                rig.p.start(send_move(n, address, IDS, IDS, transfer_id="elsewhere"))
            rig.p.start(send_move(20, rig.address, IDS, IDS))
            done = wait(rig.p)
            while done[-1].id != 20:
                assert done[-1].error is None  # what fitted into buffers
                done += wait(rig.p)
            time.sleep(0.2)  # the first that does not fit is stuck in its middle
            done += rig.p.poll()
            stuck = min({*range(2, 10)} - {r.id for r in done})
            rig.p.cancel(stuck)
            (cancelled,) = wait(rig.p)
            assert (cancelled.id, cancelled.error) == (stuck, "cancelled")
            late = wait(rig.p, 9 - stuck)
            assert all(r.error and address in r.error for r in late)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        rig.p.start(send_move(30, address, [[1]], [[1]]))
        assert wait(rig.p)[0].error is None


@links
def test_between_processes_it_arrives(scheme: str, tmp_path: Path) -> None:
    with pair(scheme, BIG, 80) as rig:
        rig.d.start(receive_move(1, IDS))
        with child("send", rig.address, "1000"):
            source = random_memory(BIG, 80, 1)
            checksum = sum(source.checksum(layer, IDS[0]) for layer in range(2))
            rig.d.expect(1, 128, checksum)
            assert [(r.id, r.error) for r in wait(rig.d)] == [(1, None)]
        np.testing.assert_array_equal(rig.d_memory.pools[1][1:65], source.pools[1][1:65])
