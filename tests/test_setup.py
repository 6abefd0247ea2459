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
TOOLS = (
    "bash", "env", "dirname", "cat", "cksum", "uname", "df", "awk", "date", "tee", "mkdir", "cp", "touch",
    "head", "rm", "grep", "sed",
)  # fmt: skip

# Answers what setup.sh asks: is it new enough, has it venv, make a venv, install, compile, load the library. Calls
# of pip are written down: in `pip-calls` those that may reach an index, in `builds` those that compile.
PYTHON = """#!/bin/sh
case "$*" in
    *"version_info < (3, 11)"*) exit {too_old} ;;
    *"import venv"*) exit {no_venv} ;;
    *"version_info[:2]"*) echo 3.12 ;;
    --version) echo Python {version} ;;
    "-m venv --clear .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version") exit 0 ;;
    *"import penstock._native"*) exit {no_library} ;;
    "-m pip install"*"--no-build-isolation"*) echo "CXX=$CXX $*" >> builds; {build} ;;
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
        for name in ("CMakeLists.txt", "src/one.cpp", "src/two.hpp"):
            path = self.folder / "native" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("content\n")
        for tool in (*TOOLS, "chmod", "sh"):
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)

    def python(self, name: str = "python3", **answers: object) -> Path:
        path = self.bin / name
        defaults = {"too_old": 0, "no_venv": 0, "version": "3.12.1", "pip": ":", "no_library": 0, "build": ":"}
        path.write_text(PYTHON.format(**defaults | answers))
        path.chmod(0o755)
        return path

    def run(self, **environ: str) -> subprocess.CompletedProcess[str]:
        clean = {"PATH": str(self.bin), "HOME": str(self.folder)}
        command = [str(self.bin / "bash"), "scripts/setup.sh"]
        return subprocess.run(
            command, cwd=self.folder, env=clean | environ, capture_output=True, text=True, timeout=60, check=False
        )

    def compiler(self, name: str = "c++") -> Path:
        path = self.bin / name
        path.symlink_to(self.bin / "touch")
        return path

    def installs(self) -> list[str]:
        return self._calls("pip-calls")

    def builds(self) -> list[str]:
        return self._calls("builds")

    def _calls(self, name: str) -> list[str]:
        calls = self.folder / name
        return calls.read_text().splitlines() if calls.exists() else []


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
    assert (len(place.installs()), len(place.builds())) == (1, 1)
    (place.folder / "constraints.txt").write_text("other\n")
    assert place.run().returncode == 0
    assert (len(place.installs()), len(place.builds())) == (2, 2)


def test_another_index_for_torch_installs_again(place: Place) -> None:
    place.python()
    place.run()
    done = place.run(TORCH_INDEX="https://example.invalid/cpu")
    assert "With torch from https://example.invalid/cpu" in done.stdout
    assert "--extra-index-url https://example.invalid/cpu" in (place.folder / "pip-calls").read_text()


@pytest.mark.parametrize("change", ["edited", "added", "removed", "CMake"])
def test_a_changed_kernel_is_only_compiled(place: Place, change: str) -> None:
    place.python()
    place.compiler()
    place.run()
    native = place.folder / "native"
    if change == "edited":
        (native / "src" / "one.cpp").write_text("other\n")
    elif change == "added":
        (native / "src" / "three.cpp").write_text("content\n")
    elif change == "removed":
        (native / "src" / "two.hpp").unlink()
    else:
        (native / "CMakeLists.txt").write_text("other\n")
    kept = place.folder / "build" / "native-cp312"
    kept.mkdir(parents=True)
    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "compiling the native kernels" in done.stdout
    assert "Setting up" not in done.stdout
    assert (len(place.installs()), len(place.builds())) == (1, 2)
    assert all(flag in place.builds()[1] for flag in ("--no-index", "--no-deps", "--no-build-isolation"))
    assert kept.exists()  # objects of files that did not change
    assert place.run().stdout == ""


def test_no_compiler_is_one_line(place: Place) -> None:
    place.python(no_library=1)
    done = place.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("no C++ compiler found") == 1
    assert "compiling" not in done.stdout
    assert place.run().stdout == ""


def test_another_compiler_compiles_everything_again(place: Place) -> None:
    place.python(no_library=1)
    place.run()
    shutil.copy(place.python(), place.folder / ".venv" / "bin" / "python")
    kept = place.folder / "build" / "native-cp312"
    for number, environ in enumerate([{}, {"CXX": "other"}, {}], start=2):
        if number == 2:
            place.compiler()
        kept.mkdir(parents=True)
        done = place.run(**environ)
        assert "no C++ compiler" not in done.stdout
        assert len(place.builds()) == number
        assert not kept.exists()
    assert [build.split()[0] for build in place.builds()] == ["CXX=", "CXX=", "CXX=other", "CXX="]
    assert len(place.installs()) == 1


def test_sources_that_do_not_compile_are_told_and_survived(place: Place) -> None:
    compiler = place.compiler("g++")
    place.python(no_library=1, build="echo '  one.cpp:3:1: error: no such kernel'; exit 1")
    done = place.run()
    assert done.returncode == 0
    assert f"note: {compiler} could not compile the native kernels, see .venv/native.log" in done.stdout
    assert done.stderr.strip() == "one.cpp:3:1: error: no such kernel"
    assert place.run().stdout == ""  # not again and again


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
    assert len(place.installs()) == 2
    assert os.access(place.folder / ".venv" / "bin" / "penstock", os.X_OK)
