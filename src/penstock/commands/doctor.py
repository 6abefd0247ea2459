"""`penstock doctor`: is this machine and this installation in order? One line each, with a verdict.

Exit code 0 when nothing is wrong; a note is no fault. torch is imported in another process, so that a broken one is
found and not suffered.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.commands import doctor_pd
from penstock.commands.arguments import parse_or_help
from penstock.commands.packages import required, satisfies
from penstock.config.complete import complete
from penstock.config.flags import FlagParser
from penstock.config.hardware import Machine, platform_words, port_holder, probe
from penstock.config.load import BUILT_IN_MODELS, model_directory, resolve
from penstock.config.values import ConfigError, format_bytes

GIB = 1 << 30
TORCH_TIMEOUT_S = 120
TORCH_PROBE = """
import torch
a = torch.ones(64, 64, dtype=torch.bfloat16)
assert float((a @ a)[0, 0]) == 64.0
print(torch.__version__, "CUDA" if torch.cuda.is_available() else "CPU only", torch.get_num_threads(), "threads")
from penstock.nn.kernels.native import usable_kernels, why_missing
print(", ".join(usable_kernels()))
print(why_missing)
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """verdict: "ok", "note" (worth knowing) or "bad" (penstock will not work as it should)."""

    verdict: str
    topic: str
    text: str


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["pd"]:
        return doctor_pd.main(arguments[1:])
    parser = FlagParser(
        prog="penstock doctor",
        description="Check this machine and installation, a line each. `penstock doctor pd` tries the KV links.",
    )
    parser.add_argument("model", nargs="?", default=BUILT_IN_MODELS[0], help="model to check the files of")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to check [8000]")
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    num_bad = 0
    for finding in findings(parsed.model, parsed.port):
        num_bad += finding.verdict == "bad"
        print(f"{finding.verdict:<5} {finding.topic:<9} {finding.text}", flush=True)
    print("all in order" if not num_bad else f"{num_bad} to fix" if num_bad > 1 else "one thing to fix")
    return 1 if num_bad else 0


def findings(model: str, port: int) -> Iterator[Finding]:
    """Cheap ones first; each is yielded as soon as it is known."""
    machine = probe()
    verdict = "ok" if sys.version_info >= (3, 11) else "bad"
    yield Finding(verdict, "python", platform_words() + ("" if verdict == "ok" else "; 3.11 or newer is needed"))
    yield from _packages()
    yield from _cpu(machine)
    yield _memory(machine)
    yield _disk()
    if machine.gpus:
        yield Finding("note", "gpu", f"{', '.join(g.name for g in machine.gpus)}; this version computes on the CPU")
    elif machine.gpu_driver_present:
        yield Finding("note", "gpu", "an NVIDIA driver is loaded but nvidia-smi shows no GPU")
    if machine.compiler:
        yield Finding("ok", "compiler", machine.compiler)
    else:
        yield Finding("note", "compiler", "no C++ compiler: penstock runs, native kernels cannot be built here")
    yield _port(port)
    yield _model(model, machine)
    yield from _torch()


def _packages() -> Iterator[Finding]:
    packages = required()
    if not packages:
        yield Finding("bad", "packages", "penstock is not installed here; run make setup, or pip install -e .")
        return
    wrong = [f"{name} {wanted} (found {have or 'none'})" for name, wanted, have in packages if not _fine(have, wanted)]
    if wrong:
        yield Finding("bad", "packages", f"missing or too old: {', '.join(wrong)}; run make setup, or pip install -e .")
    else:
        yield Finding("ok", "packages", f"all {len(packages)} are here")


def _fine(have: str | None, wanted: str) -> bool:
    return have is not None and satisfies(have, wanted)


def _cpu(machine: Machine) -> Iterator[Finding]:
    features = ", ".join(machine.cpu_features) or "no known vector features"
    yield Finding("ok", "cpu", f"{machine.num_cores} of {machine.cpu_name} ({machine.cores_note}): {features}")
    if not machine.has_fast_bf16 and not machine.has_native_kernels:
        yield Finding("note", "cpu", "no bfloat16 instructions: bfloat16 checkpoints run as float32")


def _memory(machine: Machine) -> Finding:
    free, total = machine.memory_free_bytes, machine.memory_total_bytes
    text = f"{format_bytes(free)} of {format_bytes(total)} free ({machine.memory_note})"
    return Finding("ok" if free >= GIB else "note", "memory", text if free >= GIB else f"{text}; models need some")


def _disk() -> Finding:
    parts = []
    verdict = "ok"
    for name, path, least in (
        ("temporary files", tempfile.gettempdir(), 100 << 20),
        ("home", os.path.expanduser("~"), 0),
    ):
        try:
            free = shutil.disk_usage(path).free
        except OSError:
            continue
        parts.append(f"{format_bytes(free)} for {name}")
        if free < least:
            verdict = "note"
    return Finding(verdict, "disk", ", ".join(parts) + " free")


def _port(port: int) -> Finding:
    try:
        holder = port_holder("127.0.0.1", port)
    except OSError as error:
        return Finding("note", "port", f"{port} cannot be used: {error.strerror or error}")
    if holder is None:
        return Finding("ok", "port", f"{port} is free")
    return Finding("note", "port", f"{port} is in use by {holder}; penstock serve --port {port + 1} works beside it")


def _model(name: str, machine: Machine) -> Finding:
    try:
        directory = model_directory(name)
        resolved = complete(resolve({"model": name}), machine)
    except ConfigError as error:
        return Finding("bad", "model", error.problem)
    missing = [file for file in ("tokenizer.json",) if not (directory / file).is_file()]
    weights = list(directory.glob("*.safetensors"))
    if not weights:
        missing.append("*.safetensors")
    if missing:
        return Finding("bad", "model", f"{directory} lacks {', '.join(missing)}")
    size = sum(file.stat().st_size for file in weights)
    memory = resolved.memory
    fits = f"{memory.max_full_requests:.0f} requests of {memory.max_model_len} tokens fit"
    shape = f"{resolved.model.architecture}, {format_bytes(size)} of weights"
    return Finding("ok", "model", f"{name}: {shape}; {fits}")


def _torch() -> Iterator[Finding]:
    """torch, and what the native kernels beside it can use."""
    command = [sys.executable, "-c", TORCH_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("bad", "torch", f"does not import within {TORCH_TIMEOUT_S} s")
        return
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        yield Finding("bad", "torch", f"does not work: {last}")
        return
    torch, kernels, why_missing = (done.stdout.splitlines() + ["", ""])[:3]
    yield Finding("ok", "torch", torch)
    if kernels:
        yield Finding("ok", "kernels", f"native, best first: {kernels}")
    elif why_missing:
        yield Finding("note", "kernels", f"plain torch computes: the native ones were not built ({why_missing})")
    else:
        yield Finding("note", "kernels", "plain torch computes: the native ones need AVX2 at least")
