"""What pip builds of this tree: a wheel that holds everything, also without a compiler, and a library fit to ship."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from penstock import __version__

ROOT = Path(__file__).resolve().parent.parent.parent
CMAKE = ROOT / "native" / "CMakeLists.txt"

pytest.importorskip("scikit_build_core")


def build(hook: str, folder: Path, **environ: str) -> Path:
    """Runs one hook of the build backend on this tree, as pip does. Returns the file that it made in `folder`."""
    code = f"from scikit_build_core import build; print(build.{hook}({str(folder)!r}))"
    # Under scripts/sanitize.sh the compiler is not what is watched.
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "LD_PRELOAD", "MAKEFLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / done.stdout.split()[-1]


def files_below(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in paths}


def test_without_a_compiler_the_wheel_holds_all_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("cmake")
    wheel = build("build_wheel", tmp_path, CXX="/bin/false")
    assert wheel.name == f"penstock-{__version__}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("penstock/")}
    assert names == files_below(ROOT / "src" / "penstock")
    assert "penstock/server/pages/index.html" in names
    assert "penstock/assets/penstock-tiny/model.safetensors" in names


def test_the_sdist_holds_what_a_build_and_the_tests_need(tmp_path: Path) -> None:
    with tarfile.open(build("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "tests/native/test_build.py"} <= names
    for folder in ("native", "src", "scripts"):
        assert files_below(ROOT / folder) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_version_is_the_packages() -> None:
    try:
        installed = importlib.metadata.version("penstock")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("penstock is not installed")
    assert installed == __version__


def test_the_library_is_stripped_and_brings_no_second_thread_pool() -> None:
    """OpenMP's threads would contend with torch's and with our own for the same cores."""
    libraries = list(Path(sysconfig.get_path("platlib"), "penstock").glob("_native*.so"))
    if not libraries:
        pytest.skip("installed without the native library")
    (library,) = libraries
    content = library.read_bytes()
    assert b"libgomp" not in content
    assert b".symtab" not in content
    assert len(content) < 4 << 20


def test_flags_do_not_depend_on_the_machine_that_compiles() -> None:
    """A library built on one machine runs on every other; only files named isa_* may use more than the baseline."""
    text = re.sub(r"#.*", "", CMAKE.read_text())
    assert "native" not in re.findall(r"-m(?:arch|tune|cpu)=(\S+)", text)
    assert not re.findall(r"-march=|-ffast-math|-fopenmp|-Ofast", text)
    units = set(re.findall(r"src/(\w+)\.cpp PROPERTIES", text))
    assert units == {path.stem for path in (ROOT / "native" / "src").glob("isa_*.cpp")}
