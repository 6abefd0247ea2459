"""Model directories that are not what they should be: one clear line and an exit code, never a traceback.

Each is the built-in model with one thing broken. Offline in this process for most; `penstock serve`, where the front
end and the engine's process both have to give up, for some.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.e2e.serving import ASSETS, RealServer, penstock_command

from penstock import cli

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The built-in model; its large file is a link, to be replaced and not written to."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in ASSETS.iterdir():
        if path.name == WEIGHTS:
            (directory / WEIGHTS).symlink_to(path)
        else:
            shutil.copy(path, directory / path.name)
    return directory


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def own_weights(directory: Path) -> Path:
    """A file of this copy's own."""
    path = directory / WEIGHTS
    path.unlink()
    shutil.copy(ASSETS / WEIGHTS, path)
    return path


def truncate(directory: Path) -> None:
    path = own_weights(directory)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def truncate_header(directory: Path) -> None:
    with own_weights(directory).open("r+b") as file:
        file.truncate(100)


def append(directory: Path) -> None:
    with own_weights(directory).open("ab") as file:
        file.write(b"\0" * 64)


def overwrite_header(directory: Path) -> None:
    with own_weights(directory).open("r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))


def save_changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(ASSETS / WEIGHTS)
    change(tensors)
    (directory / WEIGHTS).unlink()
    save_file(tensors, directory / WEIGHTS)


def wrong_shape(directory: Path) -> None:
    save_changed(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def wrong_dtype(directory: Path) -> None:
    save_changed(directory, lambda t: t.update({"model.norm.weight": torch.ones(384, dtype=torch.int32)}))


def tensor_missing(directory: Path) -> None:
    save_changed(directory, lambda tensors: tensors.pop("model.norm.weight"))


def shards(directory: Path, **index: Any) -> None:
    """Two shards and an index; `index` has changes to its map."""
    tensors = load_file(ASSETS / WEIGHTS)
    names = sorted(tensors)
    (directory / WEIGHTS).unlink()
    where = {}
    for number, own in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, directory / file)
        where |= dict.fromkeys(own, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where | index}))


def shard_missing(directory: Path) -> None:
    shards(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def index_disagrees(directory: Path) -> None:
    tensors = sorted(load_file(ASSETS / WEIGHTS))
    shards(directory, **{tensors[0]: "model-00002-of-00002.safetensors"})


def index_is_broken(directory: Path) -> None:
    shards(directory)
    (directory / INDEX).write_text("{")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, WEIGHTS),
    "header cut": (truncate_header, WEIGHTS),
    "trailing bytes": (append, WEIGHTS),
    "absurd header": (overwrite_header, WEIGHTS),
    "wrong shape": (wrong_shape, "model.norm.weight"),
    "wrong dtype": (wrong_dtype, "model.norm.weight"),
    "tensor missing": (tensor_missing, "model.norm.weight"),
    "shard missing": (shard_missing, "model-00002-of-00002.safetensors"),
    "index disagrees": (index_disagrees, "model-0000"),
    "index broken": (index_is_broken, INDEX),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config broken": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "unknown architecture": (lambda d: change_config(d, architectures=["Gemma9ForCausalLM"]), "Qwen3ForCausalLM"),
    "no architecture": (lambda d: change_config(d, architectures=[], model_type=None), "Qwen3ForCausalLM"),
    "absurd shape": (lambda d: change_config(d, num_key_value_heads=4), "num_key_value_heads"),
    "negative size": (lambda d: change_config(d, hidden_size=-384), "hidden_size"),
    "wrong type": (lambda d: change_config(d, hidden_size="wide"), "hidden_size"),
    "other vocabulary": (lambda d: change_config(d, vocab_size=8000), "8192"),
    "quantized": (lambda d: change_config(d, quantization_config={"quant_method": "awq"}), "awq"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer broken": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "tokenizer cut": (
        lambda d: (d / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes()[:9999]),
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_model_is_one_line(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGES[name]
    damage(copy)
    assert cli.main(["generate", str(copy), "--prompt", "Once", "--max-tokens", "1", *SMALL_KV]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert re.match(r"penstock: (?!internal error)", line)
    assert words in line and len(line) < 600


SMALL_KV = ("--kv-cache-memory-bytes", "8M")  # of a command that ends by itself


def test_shards_with_an_index_are_the_same_model(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["--prompt", "Once upon a time", "--max-tokens", "8", "--temperature", "0", *SMALL_KV]
    shards(copy)
    assert cli.main(["generate", str(copy), *greedy]) == 0
    sharded = capsys.readouterr().out
    assert cli.main(["generate", *greedy]) == 0
    assert capsys.readouterr().out == sharded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], ["/nowhere/at/all", "does not exist"]),
        (["penstock-tinny"], ["penstock-tiny"]),
        (["Qwen/Qwen3-8B"], ["Qwen/Qwen3-8B", "download"]),
        (["--tokenizer", "/nowhere"], ["/nowhere"]),
        (["--chat-template", "/nowhere.jinja"], ["/nowhere.jinja"]),
        (["--device", "cuda"], ["cuda", "not supported yet"]),
        (["--quantization", "awq"], ["awq", "int8", "w4a8"]),
        (["--dtype", "int4"], ["int4", "bfloat16"]),
    ],
)
def test_what_the_command_line_cannot_mean_is_one_line(arguments: list[str], words: list[str]) -> None:
    done = penstock_command("serve", "--port", "0", *arguments)
    assert done.returncode in (1, 2)
    [line] = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert all(word in line for word in words) and "Traceback" not in line


TEMPLATES = {
    "loops": ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "longer than 5 s"),
    "prints without end": ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "8000000 characters"),
    "reads what it must not": ("{{ messages.__class__.__mro__ }}", "__class__"),
    "is no Jinja": ("{% for %}", "line 1"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_cannot_work_ends_the_start(copy: Path, name: str) -> None:
    text, words = TEMPLATES[name]
    (copy / "chat_template.jinja").write_text(text)
    with RealServer(*SMALL_KV, model=str(copy)) as server:
        assert server.wait(60) == 1
        [line] = server.errors().splitlines()
        assert words in line and "the chat template cannot be rendered" in line
        assert server.left_over() == []


def test_a_template_that_cannot_work_is_one_line_offline(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages.__class__ }}")
    assert cli.main(["generate", str(copy), "--chat", "--prompt", "Hi", *SMALL_KV]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "the chat template cannot be rendered" in line and "__class__" in line


def test_a_server_whose_weights_are_cut_says_so_and_ends(copy: Path) -> None:
    truncate(copy)
    with RealServer(*SMALL_KV, model=str(copy)) as server:
        assert server.wait(60) == 1
        [line] = server.errors().splitlines()
        assert "the engine could not start: " in line and WEIGHTS in line and "bytes" in line
        assert server.left_over() == []
