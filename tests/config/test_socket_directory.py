"""Directories for socket files: removed by their owner, or by the next one's maker once the owner is gone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from penstock.config.socket_directory import SocketDirectory, remove_stale

OWNER = "from penstock.config.socket_directory import SocketDirectory as D; d = D(); print(d.path, flush=True); input()"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_it_is_private_and_goes_with_its_owner(place: Path) -> None:
    directory = SocketDirectory()
    path = Path(directory.path)
    assert path.parent == place and path.stat().st_mode & 0o777 == 0o700
    (path / "engine").touch()
    directory.close()
    directory.close()
    assert not path.exists()


def test_only_what_nobody_owns_is_removed(place: Path) -> None:
    mine = SocketDirectory()
    for name in ("penstock-demo-1", "penstock-x", "other"):
        (place / name).mkdir()
    (place / "other" / "owner").touch()
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().decode().strip())
        assert remove_stale(str(place)) == 0 and theirs.is_dir()
        process.kill()
        process.wait(10)
    SocketDirectory().close()
    assert not theirs.exists()
    assert sorted(path.name for path in place.iterdir()) == sorted(
        ["penstock-demo-1", "penstock-x", "other", Path(mine.path).name]
    )
    mine.close()
