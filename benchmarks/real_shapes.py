"""Model directories of real shape for benchmarks, without weights: `--load-format dummy` makes those up.

A  the shape of Qwen3-0.6B: 596 M parameters
B  penstock-tiny itself: 12.6 M parameters
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from checkpoints import A_SHAPE, ASSETS

TITLES = {"A": "Qwen3-0.6B's shape", "B": "penstock-tiny"}


def model_settings(name: str, workdir: Path) -> dict[str, Any]:
    """Settings of an engine on model "A", whose files are written under `workdir`, or "B"."""
    if name == "B":
        return {"model": "penstock-tiny"}
    directory = workdir / name
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((ASSETS / "config.json").read_text(encoding="utf-8")) | A_SHAPE
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ASSETS / file, directory / file)
    return {"model": str(directory), "load_format": "dummy"}
