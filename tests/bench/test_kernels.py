"""`penstock bench kernels` measures every kernel, or those it is asked for, and says at once what it cannot do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from penstock.bench import kernel_ceilings, kernels
from penstock.bench.kernel_weights import fused, shapes
from penstock.config.model import parse_model_config
from penstock.config.values import ConfigError
from penstock.nn.kernels.native import FORMATS, usable_kernels

needs_native = pytest.mark.skipif(
    not usable_kernels(), reason="the native kernels were not built, or not for this machine"
)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little is read that a test takes no time, and caches hold it."""
    monkeypatch.setattr(kernel_ceilings, "STREAMED_BYTES", 1 << 20)
    monkeypatch.setattr(kernel_ceilings, "READ_BYTES", 1 << 24)
    monkeypatch.setattr(kernel_ceilings, "LEAST_S", 1e-3)


def measured(out: Path, *arguments: str) -> list[dict[str, Any]]:
    tiny = ["--rows", "1,3", "--contexts", "40", "--batches", "2", "--rounds", "1", "--output-json", str(out)]
    assert kernels.main([*tiny, *arguments]) == 0
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


KV_DTYPES = ("bfloat16", "int8")
HEAD_FORMATS = ("bf16", "int8", "w8a8", "bf12")
# Kernel -> shapes and rows of penstock-tiny that it is measured with.
PRODUCTS = {
    **dict.fromkeys(FORMATS, 4 * 2),
    **{f"{name} add": 2 * 2 for name in FORMATS},
    **{f"{name} silu": 2 for name in FORMATS},
}
ATTENTION = {f"attention {dtype}": 1 for dtype in KV_DTYPES}
ROWS = {
    "norm": 2,
    "quantize": 2,
    "rotate + quantize": 2,
    "embed": 2,
    **{f"heads {dtype}": 2 + 1 for dtype in KV_DTYPES},
    **{f"embed packed {name}": 2 for name in HEAD_FORMATS},
}
HEAD = {f"head {name}{kind}": 1 for name in HEAD_FORMATS for kind in ("", " greedy", " top-k/p")}


@needs_native
def test_every_kernel_is_measured(tmp_path: Path, little: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["kernels"] == usable_kernels()[0] and data["read_gb_per_s"] > 0
    assert Counter(row["kernel"] for row in rows) == {**PRODUCTS, **ATTENTION, **ROWS, **HEAD}
    for row in rows:
        assert list(row) == [
            "kernel",
            "shape",
            "rows",
            "us",
            "gb_per_s",
            "g_operations_per_s",
            "share_of_roofline",
            "bound",
        ]
        assert 0 < row["us"] < 1e6 and row["gb_per_s"] > 0
        assert (row["share_of_roofline"] is None) == (row["bound"] == "caches")
        assert (row["g_operations_per_s"] is None) == (row["kernel"] in ROWS)
    printed = capsys.readouterr().out
    assert "attention int8     6/2 x 64, 40" in printed and printed.count("\n") == len(rows) + len(FORMATS) + 2
    silu = [line for line in printed.splitlines() if line.startswith("bf16 silu ")]
    assert [line.split()[2:6] for line in silu] == [["2048", "x", "384", "1"], ["2048", "x", "384", "3"]]


@needs_native
def test_what_lies_in_caches_has_no_share(tmp_path: Path, little: None) -> None:
    """Rows of norm take as little as they do, weights and pools go by until as much was read as caches do not hold."""
    rows = measured(tmp_path / "out.json", "--formats", "w8a8", "--kernels", usable_kernels()[-1])
    bounds = {kernel: {row["bound"] for row in rows if row["kernel"] == kernel} for kernel in ROWS | PRODUCTS | HEAD}
    for kernel in ("norm", "quantize", "rotate + quantize"):
        assert bounds[kernel] == {"caches"}
    for kernel in ("embed", "embed packed w8a8", "heads bfloat16", "heads int8"):
        assert bounds[kernel] == {"memory"}
    for kernel in ("w8a8", "w8a8 add", "w8a8 silu", "head w8a8", "head w8a8 greedy", "head w8a8 top-k/p"):
        assert bounds[kernel] and bounds[kernel] <= {"memory", "products"}


@needs_native
@pytest.mark.parametrize(
    ("only", "expected"),
    [("products", PRODUCTS), ("attention", ATTENTION), ("rows", ROWS), ("head", HEAD), ("head,rows", HEAD | ROWS)],
)
def test_only_some_are_measured(only: str, expected: dict[str, int], tmp_path: Path, little: None) -> None:
    assert Counter(row["kernel"] for row in measured(tmp_path / "out.json", "--only", only)) == expected


@needs_native
def test_inputs_are_quantized_where_a_format_wants_it(tmp_path: Path, little: None) -> None:
    rows = measured(tmp_path / "out.json", "--only", "rows", "--formats", "int4,bf16")
    names = {row["kernel"] for row in rows}
    assert not [name for name in names if "quantize" in name]
    assert {name for name in names if "packed" in name} == {"embed packed int8", "embed packed bf16"}


@needs_native
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernels", "abacus"], "no such kernels here"),
        (["--formats", "bf16,int3"], "unknown format int3"),
        (["--kv-cache-dtypes", "int8,float16"], "unknown dtype float16"),
        (["--only", "rosw"], "unknown kernels rosw; there are products, attention, rows, head; did you mean rows"),
        (["--only", "head,"], "unknown kernels ''"),
        (["--rows", "1,x"], "whole numbers"),
        (["--rows", ""], "whole numbers"),
        (["--rows", "1,65537"], "65537 is more than 65536"),
        (["--contexts", "0"], "at least 1"),
        (["--contexts", "-1"], "at least 1"),
        (["--contexts", "16777217"], "is more than"),
        (["--contexts", "16000000", "--batches", "65536"], "keys and values take"),
        (["--batches", "1,,2"], "whole numbers"),
        (["--batches", "0", "--only", "products"], "at least 1"),
        (["--num-threads", "-1"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_measured(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(bench: kernel_ceilings.Bench, formats: list[str]) -> None:
        raise AssertionError("measuring has begun")

    monkeypatch.setattr(kernel_ceilings.Bench, "measure_ceilings", measure)
    with pytest.raises(ConfigError, match=words) as found:
        kernels.main(["--rounds", "1", "--rows", "1", "--contexts", "32", "--batches", "1", *arguments])
    assert "\n" not in str(found.value) and not capsys.readouterr().out


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
    config = parse_model_config(raw)
    assert shapes(config) == [(256, 64), (64, 128), (192, 64), (64, 96)]
    assert fused(config) == [("linear_add", (64, 128)), ("linear_silu_mul", (192, 64)), ("linear_add", (64, 96))]
