"""The processes that compute, seen from the harness: started in their own environments, asked in lines of JSON.

Knows how to start, ask, time out and end a process. Knows no works.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from install import environment, python_of

HERE = Path(__file__).resolve().parent


class EngineFailed(Exception):
    """An engine did not start or answer; one line says why."""


@dataclass(frozen=True)
class Spec:
    """Which engine: `option` are penstock's kernels, else empty."""

    peer: str
    variant: str
    model: Path
    option: str = ""

    @property
    def name(self) -> str:
        option = f"/{self.option}" if self.option not in ("", "auto") else ""
        return f"{self.peer}{option}:{self.variant}"


class Line:
    """A process that answers lines with lines."""

    def __init__(self, command: list[str], env: dict[str, str], cores: list[int], log: Path, timeout_s: float) -> None:
        self._log, self._timeout_s = log, timeout_s
        log.parent.mkdir(parents=True, exist_ok=True)
        pin = ["taskset", "-c", ",".join(map(str, cores))]
        self.started_s = time.perf_counter()
        with log.open("w", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                [*pin, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True, env=env
            )

    def ask(self, question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: read tells how
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(self._timeout_s, self._process.terminate)
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            in_time = late.is_alive()
            late.cancel()
        if not line:
            rc = self._process.wait(60)
            told = tail(self._log) if in_time else f"no answer within {self._timeout_s:.0f} s"
            raise EngineFailed(f"exit code {rc}: {told}")
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)


class EngineProcess(Line):
    """An engine ready for questions. `settings`: what it said of itself; `ready_s`: seconds it took to say so."""

    def __init__(self, spec: Spec, threads: int, cores: list[int], workdir: Path, timeout_s: float) -> None:
        log = workdir / "logs" / f"{spec.model.name}-{spec.name.replace('/', '-').replace(':', '-')}.log"
        env = _env(spec.peer, threads, workdir)
        super().__init__(_command(spec, threads, workdir), env, cores, log, timeout_s)
        try:
            self.settings = self.read()["settings"]
        except EngineFailed:
            self.close()
            raise
        self.ready_s = time.perf_counter() - self.started_s

    def run(self, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
        """(seconds, token ids) of one pass over `prompts`."""
        answer = self.ask({"prompts": prompts, "num_output": num_output})
        lengths = {len(each) for each in answer["tokens"]}
        if lengths != {num_output} or len(answer["tokens"]) != len(prompts):
            raise EngineFailed(f"asked for {num_output} tokens of {len(prompts)} prompts, got lengths {lengths}")
        return answer["seconds"], answer["tokens"]


def prepare(spec: Spec, threads: int, workdir: Path) -> None:
    """Whatever the engine needs beside the checkpoint, written once. Raises EngineFailed."""
    done = _prepared(spec, workdir).with_suffix(".done")
    if done.exists():
        return
    log = workdir / "logs" / f"prepare-{spec.model.name}-{spec.peer}-{spec.variant}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    command = [*_command(spec, threads, workdir), "--prepare"]
    with log.open("w", encoding="utf-8") as out:
        env = _env(spec.peer, threads, workdir)
        rc = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, check=False).returncode
    if rc:
        raise EngineFailed(f"preparing exited with {rc}: {tail(log)}")
    done.touch()


def tail(log: Path) -> str:
    """The line of a log that tells most."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or ["it said nothing"])[-1][:300]


def _prepared(spec: Spec, workdir: Path) -> Path:
    return workdir / "prepared" / f"{spec.peer}-{spec.model.name}-{spec.variant}"


def _command(spec: Spec, threads: int, workdir: Path) -> list[str]:
    # penstock runs from the environment that runs this harness.
    python = sys.executable if spec.peer == "penstock" else str(python_of(spec.peer, workdir))
    command = [python, str(HERE / f"{spec.peer}_worker.py"), "--model", str(spec.model)]
    command += ["--prepared", str(_prepared(spec, workdir)), "--variant", spec.variant, "--threads", str(threads)]
    return [*command, "--option", spec.option]


def _env(peer: str, threads: int, workdir: Path) -> dict[str, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if peer == "vllm":  # its documentation's advice for CPUs
        wanted = [environment(peer, workdir) / "lib" / "libiomp5.so", _tcmalloc()]
        found = [str(each) for each in wanted if each is not None and each.exists()]
        if found:
            env["LD_PRELOAD"] = ":".join(found)
    return env


def _tcmalloc() -> Path | None:
    found = [path for folder in ("/usr/lib", "/usr/lib64") for path in Path(folder).glob("**/libtcmalloc*.so.4")]
    return found[0] if found else None
