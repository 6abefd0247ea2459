"""`scripts/setup.sh` on machines that lack something: one clear line each, and no second download.

The Pythons here are small shell scripts, so that a missing version or module can be shown without removing any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "setup.sh"
TOOLS = ("bash", "env", "dirname", "cat", "cksum", "uname", "df", "awk", "date", "tee", "mkdir", "cp", "touch")

# Answers what setup.sh asks: is it new enough, has it venv, make a venv, install. `pip` counts its calls.
PYTHON = """#!/bin/sh
case "$*" in
    *"version_info < (3, 11)"*) exit {too_old} ;;
    *"import venv"*) exit {no_venv} ;;
    *"version_info[:2]"*) echo 3.12 ;;
    --version) echo Python {version} ;;
    "-m venv --clear .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version") exit 0 ;;
    "-m pip install"*)
        echo "$*" >> pip-calls
        echo "  Downloading torch-2.13.0-cp312-cp312-manylinux.whl (800.1 MB)"
        {pip}
        touch .venv/bin/penstock; chmod +x .venv/bin/penstock ;;
esac
"""


class Place:
    """A copy of the script in an empty project, and a PATH with chosen tools only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "project", folder / "bin"
        (self.folder / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(SCRIPT, self.folder / "scripts" / "setup.sh")
        for name in ("pyproject.toml", "constraints.txt"):
            (self.folder / name).write_text("content\n")
        for tool in (*TOOLS, "chmod", "sh"):
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)

    def python(self, name: str = "python3", **answers: object) -> Path:
        path = self.bin / name
        defaults = {"too_old": 0, "no_venv": 0, "version": "3.12.1", "pip": ":"}
        path.write_text(PYTHON.format(**defaults | answers))
        path.chmod(0o755)
        return path

    def run(self, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {"PATH": str(self.bin), "HOME": str(self.folder)}
        command = [str(self.bin / "bash"), "scripts/setup.sh"]
        return subprocess.run(
            command, cwd=self.folder, env=clean | environ, capture_output=True, text=True, timeout=60, check=False
        )

    def num_installs(self) -> int:
        calls = self.folder / "pip-calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_set_up_once_and_never_again(place: Place) -> None:
    place.python()
    first = place.run()
    assert first.returncode == 0, first.stderr
    assert "GB of download" in first.stdout.split("downloading")[0]  # told before it happens
    assert "downloading torch 2.13.0, 800.1 MB" in first.stdout
    assert "Ready after" in first.stdout
    second = place.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert place.num_installs() == 1
    (place.folder / "constraints.txt").write_text("other\n")
    assert place.run().returncode == 0
    assert place.num_installs() == 2


def test_another_index_for_torch_installs_again(place: Place) -> None:
    place.python()
    place.run()
    done = place.run(TORCH_INDEX="https://example.invalid/cpu")
    assert "With torch from https://example.invalid/cpu" in done.stdout
    assert "--extra-index-url https://example.invalid/cpu" in (place.folder / "pip-calls").read_text()


def test_a_missing_compiler_is_one_line(place: Place) -> None:
    place.python()
    done = place.run()
    assert done.returncode == 0
    assert done.stdout.count("no C++ compiler found") == 1
    (place.bin / "g++").symlink_to(place.bin / "touch")
    (place.folder / "constraints.txt").write_text("other\n")
    assert "no C++ compiler" not in place.run().stdout


def test_no_python_or_an_old_one(place: Place) -> None:
    assert "penstock needs Python 3.11 or newer (python3: none)" in place.run().stderr
    place.python(too_old=1, version="3.9.2")
    done = place.run()
    assert done.returncode == 1
    assert "penstock needs Python 3.11 or newer (python3: Python 3.9.2)" in done.stderr
    assert done.stderr.count("\n") == 1
    place.python("python3.12")  # a newer one under another name is found
    assert place.run().returncode == 0


def test_a_named_python_is_taken_or_refused(place: Place) -> None:
    place.python()
    old = place.python("python3.8", too_old=1, version="3.8.1")
    done = place.run(PYTHON=str(old))
    assert done.returncode == 1
    assert "Python 3.8.1" in done.stderr


def test_no_venv_module(place: Place) -> None:
    place.python(no_venv=1)
    done = place.run()
    assert done.returncode == 1
    assert "has no venv module; on Debian or Ubuntu: apt install python3.12-venv" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_failed_install_is_not_taken_for_done(place: Place) -> None:
    place.python(pip='echo "ERROR: no such version"; exit 1')
    done = place.run()
    assert done.returncode == 1
    assert "ERROR: no such version" in done.stderr
    assert "the whole story is in .venv/setup.log" in done.stderr
    assert "ERROR" in (place.folder / ".venv" / "setup.log").read_text()
    place.python()
    shutil.rmtree(place.folder / ".venv")
    assert place.run().returncode == 0
    assert place.num_installs() == 2
    assert os.access(place.folder / ".venv" / "bin" / "penstock", os.X_OK)
