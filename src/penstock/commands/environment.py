"""`penstock collect-env` and `penstock version`: what a bug report needs. Prints no secret and no user name."""

from __future__ import annotations

import os
import platform

from penstock import __version__
from penstock.commands.arguments import parse_or_help
from penstock.commands.packages import installed, required
from penstock.config.flags import FlagParser
from penstock.config.hardware import probe
from penstock.config.schema import settings

# Beside penstock's own: what changes speed or results of the libraries below.
_PREFIXES = ("PENSTOCK_", "VLLM_", "OMP_", "KMP_", "MKL_", "TORCH_", "CUDA_", "NVIDIA_VISIBLE", "MALLOC_")
_OPTIONAL = ("transformers", "triton", "openai", "hypothesis", "nanobind")


def version(arguments: list[str]) -> int:
    print(f"penstock {__version__}")
    return 0


def main(arguments: list[str]) -> int:
    parser = FlagParser(prog="penstock collect-env", description="Print what a bug report needs; no secrets.")
    if parse_or_help(parser, arguments) is None:
        return 0
    machine = probe()
    print(f"penstock        {__version__}")
    print(f"python          {platform.python_version()} ({platform.python_implementation()})")
    print(f"system          {platform.platform()}")
    print(f"libc            {' '.join(platform.libc_ver()) or 'unknown'}")
    print(f"machine         {machine.words}")
    print(f"cores           {machine.num_cores} ({machine.cores_note})")
    print(f"memory          {machine.memory_note}")
    print(f"compiler        {machine.compiler or 'none'}")
    for name, _, have in required():
        print(f"{name:<15} {have or 'missing'}")
    for name in _OPTIONAL:
        if have := installed(name):
            print(f"{name:<15} {have}")
    secret = {variable for item in settings().values() if item.extra.get("secret") for variable in _variables(item)}
    for variable in sorted(os.environ):
        if variable.startswith(_PREFIXES):
            hidden = variable in secret or any(word in variable for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
            print(f"{variable}={'(hidden)' if hidden else os.environ[variable]}")
    return 0


def _variables(item: object) -> list[str]:
    return [getattr(item, "env", ""), *getattr(item, "extra", {}).get("env", {})]
