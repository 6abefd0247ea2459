"""`penstock bench kernels` measures every format and attention, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.bench import kernels
from penstock.config.model import parse_model_config
from penstock.config.values import ConfigError
from penstock.nn.kernels.native import FORMATS, usable_kernels

needs_native = pytest.mark.skipif(
    not usable_kernels(), reason="the native kernels were not built, or not for this machine"
)


@needs_native
def test_every_kernel_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "STREAMED_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "READ_BYTES", 1 << 24)
    out = tmp_path / "out.json"
    arguments = ["--rows", "1,3", "--contexts", "40", "--batches", "2", "--rounds", "1", "--output-json", str(out)]
    assert kernels.main(arguments) == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["kernels"] == usable_kernels()[0] and data["read_gb_per_s"] > 0
    rows = data["rows"]
    assert len(rows) == len(FORMATS) * 4 * 2 + 2
    assert {row["kernel"] for row in rows} == {*FORMATS, "attention bfloat16", "attention int8"}
    for row in rows:
        assert row["us"] > 0 and row["share_of_roofline"] > 0
    printed = capsys.readouterr().out
    assert "attention int8     6/2 x 64, 40" in printed and printed.count("\n") == len(rows) + len(FORMATS) + 2


@needs_native
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernels", "abacus"], "no such kernels here"),
        (["--formats", "bf16,int3"], "unknown format int3"),
        (["--kv-cache-dtypes", "int8,float16"], "unknown dtype float16"),
        (["--rows", "1,x"], "whole numbers"),
        (["--contexts", "0"], "at least 1"),
        (["--num-threads", "-1"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "STREAMED_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match=words):
        kernels.main(["--rounds", "1", "--rows", "1", "--contexts", "32", "--batches", "1", *arguments])


def test_shapes_are_those_of_a_layer() -> None:
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    assert kernels.shapes(parse_model_config(raw)) == [(256, 64), (64, 128), (192, 64), (64, 96)]
