"""Where the shared tokenizers, templates and reference cases lie, as Python values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SEPARATOR = "\n__ggml_vocab_test__\n"


def checkpoints(shared_dir: Path) -> Path:
    return shared_dir / "data" / "checkpoints"


def parity_cases(shared_dir: Path, name: str) -> list[tuple[str, list[int]]]:
    """(text, ids without special tokens) of the .inp and .out files of a vocabulary."""
    stem = checkpoints(shared_dir) / "tokenizers" / "gguf-vocab" / f"ggml-vocab-{name}.gguf"
    with open(f"{stem}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split(SEPARATOR)
    lines = Path(f"{stem}.out").read_text(encoding="ascii").split("\n")
    assert texts.pop() == ""  # the file ends with a separator
    assert lines.pop() == ""  # and the other one with a newline
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


def qwen_directory(shared_dir: Path, config: str, directory: Path) -> Path:
    """A checkpoint directory of the Qwen family: Qwen2's vocabulary with the tokenizer_config.json of `config`."""
    source = checkpoints(shared_dir) / "tokenizers"
    directory.mkdir(parents=True, exist_ok=True)
    for file in ("qwen2/vocab.json", "qwen2/merges.txt", f"{config}/tokenizer_config.json"):
        shutil.copyfile(source / file, directory / Path(file).name)
    return directory


def template_references(shared_dir: Path) -> dict[str, list[int]]:
    """Name -> token ids that a family's template gives for a fixed conversation."""
    directory = checkpoints(shared_dir) / "chat_templates" / "specforge_references"
    return {
        path.name.removesuffix("_ref.json"): json.loads(path.read_text(encoding="utf-8"))["input_ids"]
        for path in sorted(directory.glob("*_ref.json"))
    }


def templates(shared_dir: Path) -> dict[str, str]:
    """Name -> text of every shared chat template: the .jinja files and those inside tokenizer_config.json files."""
    root = checkpoints(shared_dir)
    files = sorted([*root.glob("chat_templates/*.jinja"), *root.glob("tokenizers/*/*.jinja")])
    found = {f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8") for path in files}
    for path in sorted(root.glob("tokenizers/*/tokenizer_config.json")):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config.get("chat_template"), str):
            found[f"{path.parent.name}/config"] = config["chat_template"]
    return found
