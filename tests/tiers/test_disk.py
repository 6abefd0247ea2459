"""The disk store: what it says it has is whole, whatever happens to its process, its files and its disk."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiers.tier_blocks import ONE, TWO, key, layout_of, record

from penstock.tiers.disk import HEADER_BYTES, DiskStore, FileCalls, StoreRefused
from penstock.tiers.record import RecordFormat

FORMAT = RecordFormat.of(ONE.groups[0])
SIZE = FORMAT.num_bytes


def open_store(directory, num_blocks=12, per_segment=4, layout=ONE, **more) -> DiskStore:
    size = sum(RecordFormat.of(group).num_bytes for group in layout.groups)
    segments = -(-num_blocks // per_segment)
    num_bytes = len(layout.groups) * segments * HEADER_BYTES + num_blocks * size
    return DiskStore(directory, layout, num_bytes, HEADER_BYTES + per_segment * SIZE, **more)


def put(store, *numbers, group=0) -> list[bool]:
    names = [key(n, group) for n in numbers]
    return store.write(names, [record(store.formats[group], name).data for name in names])


def get(store, *numbers, group=0) -> list[bool]:
    """Reads; what is said to be there must be the block."""
    names = [key(n, group) for n in numbers]
    buffers = [np.zeros(store.formats[group].num_bytes, np.uint8) for _ in names]
    found = store.read(names, [buffer.data for buffer in buffers])
    for name, ok, buffer in zip(names, found, buffers, strict=True):
        if ok:
            assert store.formats[group].is_whole(buffer, name)
    return found


def used_bytes(directory) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.segment"))


def test_written_blocks_are_read_and_deleted_ones_are_not(tmp_path):
    store = open_store(tmp_path)
    assert put(store, 1, 2, 3) == [True] * 3
    assert put(store, 2) == [True], "it is there"
    assert get(store, 1, 2, 3, 4) == [True, True, True, False]
    store.delete([key(2)])
    assert get(store, 1, 2, 3) == [True, False, True]
    assert store.find([key(1), key(2)]) == [True, False]
    store.close()


def test_a_restart_keeps_the_content(tmp_path):
    store = open_store(tmp_path, layout=TWO)
    blocks = [record(store.formats[g], key(n, g)) for g in range(2) for n in range(3)]
    for n, block in enumerate(blocks):
        store.formats[n // 3].describe(block, key(99, n // 3), n * 0.5)
    names = [key(n, g) for g in range(2) for n in range(3)]
    assert all(store.write(names, [block.data for block in blocks]))
    store.delete([key(1, 0)])
    store.close()
    store = open_store(tmp_path, layout=TWO)
    found = sorted(store.recovered())
    assert found == sorted(
        (key(n, g), key(99, g), (3 * g + n) * 0.5) for g in range(2) for n in range(3) if (n, g) != (1, 0)
    )
    assert get(store, 0, 1, 2) == [True, False, True] and get(store, 0, 1, 2, group=1) == [True] * 3
    store.close()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_it_is_a_bounded_dictionary(tmp_path_factory, seed):
    """Random writes, deletes, reads and restarts against a set of names; files never grow beyond the bound."""
    directory = tmp_path_factory.mktemp("kv")
    dice = random.Random(seed)
    store = open_store(directory, 7, 3)
    bound = store.num_blocks[0]
    assert bound == 6, "whole segments only"
    there: set[int] = set()
    for _ in range(40):
        n = dice.randrange(12)
        action = dice.randrange(5)
        if action < 2:
            expected = n in there or len(there) < bound
            assert put(store, n) == [expected]
            there |= {n} if expected else set()
        elif action == 2:
            store.delete([key(n)])
            there.discard(n)
        elif action == 3:
            assert get(store, n) == [n in there]
        elif dice.random() < 0.3:
            store.close()
            store = open_store(directory, 7, 3)
        assert len(store) == len(there)
        assert used_bytes(directory) <= 2 * (HEADER_BYTES + 3 * SIZE)
    assert get(store, *range(12)) == [n in there for n in range(12)]
    store.delete([key(n) for n in there])
    assert len(list(directory.glob("*.segment"))) <= 1, "empty segments are given back"
    store.close()


def test_a_smaller_bound_gives_segments_back(tmp_path):
    store = open_store(tmp_path, 12)
    put(store, *range(12))
    store.close()
    store = open_store(tmp_path, 4)
    assert len(store) == 4 and len(list(tmp_path.glob("*.segment"))) == 1
    assert sum(get(store, *range(12))) == 4
    store.close()


def test_two_pools_never_share_a_directory(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(StoreRefused, match="in use"):
        open_store(tmp_path)
    store.close()
    open_store(tmp_path).close()


def test_another_format_is_refused_and_both_are_named(tmp_path):
    other = layout_of(None, head_dim=32)
    store = open_store(tmp_path)
    put(store, 1)
    store.close()
    with pytest.raises(StoreRefused) as refused:
        open_store(tmp_path, layout=other)
    assert ONE.format in str(refused.value) and other.format in str(refused.value)
    open_store(tmp_path).close()


def test_bad_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreRefused, match="file"):
        open_store(tmp_path / "file")
    with pytest.raises(StoreRefused, match="hold no block"):
        DiskStore(tmp_path / "small", ONE, 1000)
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(StoreRefused, match="Permission"):
            open_store(tmp_path / "locked")


@settings(deadline=None, max_examples=60)
@given(bit=st.integers(0, 8 * (HEADER_BYTES + 2 * SIZE) - 1), restarts=st.booleans())
def test_flipped_bits_are_misses(tmp_path_factory, bit, restarts):
    directory = tmp_path_factory.mktemp("kv")
    store = open_store(directory)
    put(store, 1, 2)
    if restarts:
        store.close()
    [path] = directory.glob("*.segment")
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
    if restarts:
        store = open_store(directory)
    found = get(store, 1, 2)  # checks the content of what it finds
    assert sum(found) >= (0 if bit // 8 < HEADER_BYTES else 1)
    assert get(store, 1, 2) == found, "a damaged block is dropped"
    assert store.error is None
    store.close()


def test_noise_instead_of_segments_is_no_block(tmp_path):
    dice = np.random.default_rng(0)
    (tmp_path / "kv-0-0.segment").write_bytes(dice.bytes(HEADER_BYTES + 3 * SIZE))
    (tmp_path / "kv-0-1.segment").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("somebody's")
    store = open_store(tmp_path)
    assert len(store) == 0 and put(store, 1) == [True]
    store.close()
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_full_or_broken_disk_says_no(tmp_path, problem):
    """Whatever was half written is no block; when there is room again, it goes on."""
    left = [3 * SIZE]

    def write(fd, data, offset):
        if left[0] <= 0:
            raise OSError(problem, os.strerror(problem))
        data = data[: left[0]]
        left[0] -= len(data)
        return os.pwrite(fd, data, offset)

    store = open_store(tmp_path, calls=FileCalls(write=write))
    assert put(store, 1, 2, 3, 4) == [True, True, False, False]
    assert os.strerror(problem) in store.error
    assert get(store, 1, 2, 3, 4) == [True, True, False, False] and store.error is None
    store.close()
    store = open_store(tmp_path)
    assert get(store, 1, 2, 3, 4) == [True, True, False, False]
    assert put(store, 3, 4) == [True, True]
    store.close()


def test_a_disk_that_cannot_be_read_says_so(tmp_path):
    def read(fd, buffers, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = open_store(tmp_path, calls=FileCalls(read=read))
    put(store, 1)
    assert get(store, 1) == [False]
    assert "cannot read" in store.error
    assert len(store) == 1, "trouble is no damage: it may be there next time"
    store.close()


def test_what_is_not_whole_is_not_stored(tmp_path):
    store = open_store(tmp_path)
    bad = record(FORMAT, key(1))
    bad[-100] ^= 1
    assert store.write([key(1), key(2)], [bad.data, record(FORMAT, key(3)).data]) == [False, False]
    assert len(store) == 0 and store.error is None
    store.close()


def write_until_killed(directory, num_bytes: int, seed: int) -> None:
    """Write, delete and overwrite; after so many bytes this process is killed, wherever that is."""
    left = num_bytes

    def write(fd, data, offset):
        nonlocal left
        num = os.pwrite(fd, data[: max(1, min(left, 5000))], offset)
        left -= num
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return num

    dice = random.Random(seed)
    store = open_store(directory, 24, 4, calls=FileCalls(write=write))
    while True:
        put(store, *(dice.randrange(40) for _ in range(3)))
        store.delete([key(dice.randrange(40)) for _ in range(dice.randrange(6))])


def kill_rounds(directory, num_rounds: int) -> int:
    """Over one directory; after each death everything that it has is whole. Blocks found, over all rounds."""
    dice = random.Random(5)
    num_found = 0
    for n in range(num_rounds):
        child = os.fork()
        if not child:
            write_until_killed(directory, dice.randrange(1, 40 * SIZE) if n else 2 * SIZE, n)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        dice.random()
        store = open_store(directory, 24, 4)
        names = [name for name, _, _ in store.recovered()]
        numbers = [int.from_bytes(name[:16], "little") for name in names]
        assert len(set(numbers)) == len(numbers) == len(store)
        assert get(store, *numbers) == [True] * len(numbers), "a header without its page"
        assert store.num_bad == 0 and used_bytes(directory) <= 6 * (HEADER_BYTES + 4 * SIZE)
        num_found += len(numbers)
        store.close()
    return num_found


def test_kill_9_in_mid_write_leaves_whole_blocks(tmp_path):
    """Eighty deaths at random bytes, in a process of its own: this one has threads and must not fork."""
    code = "import sys; sys.path.insert(0, '.'); from tests.tiers.test_disk import *; from pathlib import Path\n"
    code += "print(kill_rounds(Path(sys.argv[1]), 80))"
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80
