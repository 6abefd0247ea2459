"""The host arena: the same slots for everyone who maps it, and nobody of another layout."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from tests.tiers.tier_blocks import ONE, TWO, key, record

from penstock.tiers.arena import Arena, ArenaError, arena_bytes, discard, slots_for


def test_processes_share_slots(tmp_path):
    arena = Arena.create(tmp_path / "arena", TWO, (3, 5))
    other = Arena.attach(tmp_path / "arena", TWO, (3, 5))
    (tmp_path / "arena").unlink()
    for group, num in ((0, 3), (1, 5)):
        for slot in range(1, num + 1):
            name = key(slot, group)
            arena.record(group, slot)[:] = record(arena.formats[group], name)
    for group, num in ((0, 3), (1, 5)):
        for slot in range(1, num + 1):
            assert other.formats[group].is_whole(other.record(group, slot), key(slot, group))
    arena.close()
    other.close()


def test_another_layout_is_refused_and_both_are_named(tmp_path):
    Arena.create(tmp_path / "arena", ONE, (3,)).close()
    with pytest.raises(ArenaError) as refused:
        Arena.attach(tmp_path / "arena", TWO, (3, 3))
    assert ONE.format in str(refused.value) and TWO.format in str(refused.value)
    with pytest.raises(ArenaError, match="x 3"):
        Arena.attach(tmp_path / "arena", ONE, (4,))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ArenaError, match="cannot open"):
        Arena.attach(tmp_path / "none", ONE, (3,))
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(ArenaError, match="no KV arena"):
        Arena.attach(tmp_path / "short", ONE, (3,))
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(100_000))
    with pytest.raises(ArenaError):
        Arena.attach(tmp_path / "noise", ONE, (3,))
    Arena.create(tmp_path / "arena", ONE, (3,)).close()
    with pytest.raises(ArenaError, match="cannot make"):
        Arena.create(tmp_path / "arena", ONE, (3,))


def test_no_room_is_said_at_once(tmp_path):
    """Not by a signal at the first touch. In a child, whose files may not grow so large."""
    code = (
        "import resource, sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from penstock.tiers.arena import Arena, ArenaError; from tests.tiers.tier_blocks import ONE\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (8192, {resource.RLIM_INFINITY}))\n"
        "try: Arena.create(Path(sys.argv[1]), ONE, (100,))\n"
        "except ArenaError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "arena"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "no room" in done.stdout, done.stderr
    assert not (tmp_path / "arena").exists()


def test_a_private_arena_has_the_slots_that_fit():
    slots = slots_for(TWO, 1_000_000)
    assert slots[0] == slots[1] > 1
    assert arena_bytes(TWO, slots) <= 1_000_000 < arena_bytes(TWO, tuple(n + 1 for n in slots))
    arena = Arena.private(TWO, slots)
    arena.record(1, slots[1])[:] = 7
    assert not arena.record(0, slots[0]).any()
    arena.close()


def test_a_dead_pools_memory_goes_though_engines_have_it_mapped(tmp_path):
    """They read zeros, which are no block; the next pool's arena is another file."""
    path = tmp_path / "arena"
    Arena.create(path, ONE, (64,)).close()
    engine = Arena.attach(path, ONE, (64,))
    for slot in range(1, 65):
        engine.record(0, slot)[:] = 0xEE
    kept = os.open(path, os.O_RDONLY)
    num_bytes = os.fstat(kept).st_blocks * 512
    assert num_bytes >= 64 * engine.formats[0].num_bytes
    discard(path)
    assert not path.exists() and os.fstat(kept).st_blocks * 512 < num_bytes / 4
    os.close(kept)
    assert engine.formats[0].header(engine.record(0, 7)) is None and not engine.record(0, 7).any()
    engine.record(0, 7)[:] = 1  # a save that was under way harms nobody
    discard(path)  # there is none
    Arena.create(path, ONE, (64,)).close()
