"""`penstock quantize` and what comes of it, end to end: the tokens of quantizing while loading (E0), and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.e2e.serving import MODEL, RealServer, penstock_command

from penstock import cli
from penstock.core.request import SamplingParams
from penstock.llm import LLM
from penstock.nn.kernels.native import usable_kernels

pytestmark = pytest.mark.skipif(
    not usable_kernels(), reason="the native kernels were not built, or not for this machine"
)
PROMPTS = ["Once upon a time", "The little dog", "Hello! Who are you?"]
SMALL = {"max_model_len": 256, "kv_cache_memory_bytes": "32M", "dtype": "bfloat16"}


def answers(model: str | Path, **settings: Any) -> list[list[int]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False)
    with LLM(model, **SMALL, **settings) as llm:
        assert "kernels" in llm._built.ready.device
        return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, greedy, use_tqdm=False)]


def quantized(directory: Path, scheme: str, *flags: str) -> Path:
    out = directory / scheme
    assert cli.main(["quantize", MODEL, str(out), "--scheme", scheme, "--method", "rtn", *flags]) == 0
    return out


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4", "w4a8"])
def test_tokens_are_those_of_quantizing_while_loading(tmp_path: Path, scheme: str) -> None:
    made = quantized(tmp_path, scheme, "--head", "8bit")
    assert answers(made) == answers(MODEL, quantization=scheme)


def test_a_server_on_a_quantized_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = quantized(tmp_path, "int4")
    assert f"next: penstock serve {made}" in capsys.readouterr().out
    told = penstock_command("plan", str(made), "--kv-cache-memory-bytes", "32M").stdout
    assert "parameters in int4" in told
    flags = ("--max-model-len", "256", "--kv-cache-memory-bytes", "32M", "--dtype", "bfloat16")
    with RealServer(*flags, model=str(made)) as server:
        server.until_ready()
        body = {"model": str(made), "prompt": PROMPTS[0], "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        text = server.post("/v1/completions", body).json()["choices"][0]["text"]
    with LLM(made, **SMALL) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        assert text == llm.generate(PROMPTS[0], greedy, use_tqdm=False)[0].outputs[0].text
    plain = ["generate", str(made), "--prompt", PROMPTS[0], "--max-tokens", "4", "--cpu-kernels", "torch"]
    assert cli.main([*plain, "--kv-cache-memory-bytes", "8M"]) == 0
    assert capsys.readouterr().out.strip()


def refusal(model: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    asked = ["generate", str(model), "--prompt", "Once", "--max-tokens", "1", "--kv-cache-memory-bytes", "8M", *flags]
    assert cli.main(asked) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("penstock: ") and "internal error" not in line
    return line


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = quantized(tmp_path, "w8a8")
    capsys.readouterr()
    assert "w4a8 was asked for" in refusal(made, capsys, "--quantization", "w4a8")
    without = refusal(Path(MODEL), capsys, "--quantization", "int8", "--cpu-kernels", "torch")
    assert "int8 needs native kernels, and --cpu-kernels torch is without" in without
    tensors = load_file(made / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight_scale"
    save_file({**tensors, name: tensors[name] * float("nan")}, made / "model.safetensors")
    assert name in refusal(made, capsys)
    save_file({**tensors, name: tensors[name][:5].clone()}, made / "model.safetensors")
    assert f"{name} has shape [5, 1]" in refusal(made, capsys)
    tensors.pop(name)
    save_file(tensors, made / "model.safetensors")
    assert name in refusal(made, capsys)
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (made / "config.json").write_text(json.dumps(config))
    assert "zero points" in refusal(made, capsys)
    for arguments, words in (
        (["quantize", str(made), str(tmp_path / "x"), "--scheme", "int4"], "zero points"),
        (["quantize", MODEL, str(made), "--scheme", "int8"], "not an empty directory"),
        (["quantize", MODEL, str(tmp_path / "x"), "--scheme", "int4", "--calibration", "/nowhere.txt"], "/nowhere.txt"),
        (["quantize", MODEL, str(tmp_path / "x"), "--scheme", "int3"], "int3"),
        (["quantize", MODEL, str(tmp_path / "x"), "--scheme", "int4", "--num-samples", "0"], "--num-samples"),
    ):
        assert cli.main(arguments) in (1, 2)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("calibration", ["builtin", "file"])
def test_calibrated(tmp_path: Path, calibration: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. It ran to the park and saw a cat.\n\n" * 60)
    flags = ["--calibration", str(text)] if calibration == "file" else []
    out, sizes = tmp_path / "out", ["--num-samples", "6", "--sample-tokens", "48"]
    assert cli.main(["quantize", MODEL, str(out), "--scheme", "int4", *sizes, *flags]) == 0
    assert "in int4 (gptq)" in capsys.readouterr().out
    assert len(answers(out)) == len(PROMPTS)
