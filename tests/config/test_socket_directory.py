"""Directories for socket files: removed by their owner, or by the next one's maker once the owner is gone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from penstock.config import socket_directory
from penstock.config.socket_directory import SocketDirectory, remove_stale

OWNER = """
import sys
from penstock.config import socket_directory
socket_directory.MEMORY = sys.argv[1]
directory = socket_directory.SocketDirectory()
print(directory.path, flush=True)
input()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(socket_directory, "MEMORY", str(tmp_path))
    return tmp_path


def test_it_is_private_and_goes_with_its_owner(place: Path) -> None:
    directory = SocketDirectory()
    path = Path(directory.path)
    assert path.parent == place and path.stat().st_mode & 0o777 == 0o700
    (path / "engine").touch()
    directory.close()
    directory.close()
    assert not path.exists()


def test_where_the_system_has_no_such_place(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setattr(socket_directory, "MEMORY", str(place / "nothing"))
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    directory = SocketDirectory()
    assert Path(directory.path).parent == other
    directory.close()


def test_only_what_nobody_owns_is_removed(place: Path) -> None:
    mine = SocketDirectory()
    for name in ("penstock-demo-1", "penstock-x", "other"):
        (place / name).mkdir()
    (place / "other" / "owner").touch()
    command = [sys.executable, "-c", OWNER, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
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
