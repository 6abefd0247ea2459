"""benchmarks/peers/table.py on a small result, and that docs/benchmarks.md has what its own results say."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers.table import PAGE, RESULTS, Malformed, main, rounded, stale, table, written

ROUNDS = 3
TITLES = {
    "stream": "A, one stream",
    "batch": "A, 32 x (128 in / 64 out)",
    "ttft": "A, first token",
    "b256": "B, 256 x (64 in / 32 out)",
    "startup": "A, process start",
}
FIGURES = {"stream": "decode", "batch": "output", "b256": "output"}


def seconds(median_s: float, times: int = ROUNDS, **more: float) -> dict[str, Any]:
    return {"median_s": median_s, "seconds": [median_s] * times, **more}


def batch(all_per_s: float, decode_per_s: float, times: int = ROUNDS) -> dict[str, Any]:
    return seconds(9.0, times, output_tokens_per_s=all_per_s, decode_tokens_per_s=decode_per_s)


def entry(work: str, group: str, engines: dict[str, Any], ratios: dict[str, float]) -> dict[str, Any]:
    named = {"work": work, "title": TITLES[work], "group": group, "figure": FIGURES.get(work, "seconds")}
    return {**named, "engines": engines, "ratio_over_best_peer": ratios}


def save(path: Path, *works: dict[str, Any]) -> None:
    path.write_text(json.dumps({"rounds": ROUNDS, "works": works}), encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    stream = {
        "llamacpp:bf16": batch(1.0, 25.86),
        "penstock:bf12": batch(1.0, 31.7),
        "vllm:bf16": batch(1.0, 17.45, times=1),
        "penstock:bf16": batch(1.0, 26.0),
    }
    many = {
        "penstock:bf16": batch(113.58, 260.73),
        "penstock:bf12": batch(105.03, 220.89),
        "llamacpp:bf16": batch(96.42, 192.47, times=2),
        "vllm:bf16": batch(94.08, 200.0),
    }
    eight = {
        "penstock:w8a8": batch(208.2, 440.0),
        "penstock:w8a8c8": batch(220.0, 500.0),
        "vllm:w8a8": batch(104.1, 220),
    }
    start = {"penstock:bf16": seconds(2.19), "vllm:bf16": seconds(82.364, times=1), "llamacpp:bf16": seconds(2.823, 2)}
    save(
        tmp_path / "one.json",
        entry("startup", "bf16", start, {"penstock:bf16": 1.289}),
        entry("batch", "bf16", many, {"penstock:bf16": 1.178, "penstock:bf12": 1.089}),
        entry("stream", "bf16", stream, {"penstock:bf16": 1.005, "penstock:bf12": 1.226}),
        entry("batch", "8bit", eight, {"penstock:w8a8": 2.0, "penstock:w8a8c8": 2.113}),
    )
    return tmp_path


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("26.0", "26.0"), ("17.45", "17.5"), ("9.085", "9.09"), ("9.996", "10.0"), ("99.96", "100"), ("192.47", "192"),
        ("2810.5", "2,811"), ("12547.59", "12,548"), ("1.005", "1.01"), ("0.625", "0.63"), ("0.997", "1.00"),
        ("64", "64.0"), ("999.6", "1,000"),
    ],
)  # fmt: skip
def test_three_digits_and_a_half_away_from_zero(value: str, shown: str) -> None:
    assert rounded(Decimal(value)) == shown


def test_one_group_with_a_slow_and_without_a_missing_engine(results: Path) -> None:
    """OpenVINO and transformers are nowhere: no column. `bf12` is for one stream only, rows are in works' order."""
    assert rows(table("peers", "bf16 | one.json | bf16", results)) == [
        ["bf16", "penstock", "llama.cpp", "vLLM", "over the fastest"],
        ["---"] * 5,
        ["A, one stream: decoding", "26.0 tok/s (`bf12` 31.7)", "25.9", "17.5 (1)", "1.01x (1.23x)"],
        [f"{TITLES['batch']}: all, decoding alone", "114, 261 tok/s", "96.4, 192 (1)", "94.1, 200", "1.18x, 1.30x"],
        ["A, process start", "2.19 s", "2.82", "82.4 (1)", "1.29x"],
    ]


def test_a_work_that_one_group_has_and_one_engine_has_not(results: Path) -> None:
    """Groups are told in rows as soon as there are two, variants by name; what was not measured is a dash."""
    found = rows(table("peers", "all | one.json | 8bit bf16 4bit", results))
    assert [row[0] for row in found[2:]] == [
        "A, 8 bits, 32 x (128 in / 64 out): all, decoding alone",
        "A, bf16, one stream: decoding",
        "A, bf16, 32 x (128 in / 64 out): all, decoding alone",
        "A, bf16, process start",
    ]
    assert found[2][1:] == ["`w8a8` 208, 440 tok/s (`w8a8c8` 220, 500)", "-", "104, 220", "2.00x, 2.00x (2.11x, 2.27x)"]


def test_without_peers_and_without_our_own(results: Path) -> None:
    save(
        results / "two.json",
        entry("ttft", "bf16", {"penstock:bf16": seconds(0.3048)}, {}),
        entry("b256", "bf16", {"vllm:bf16": seconds(1.0, output_tokens_per_s=3643.49)}, {}),
    )
    found = rows(table("peers", "bf16 | two.json | bf16", results))
    assert found[0] == ["bf16", "penstock", "vLLM"]
    assert found[2:] == [["A, first token", "305 ms", "-"], [TITLES["b256"], "-", "3,643 tok/s"]]


def test_later_files_add_works_and_variants_but_no_peers(results: Path) -> None:
    save(results / "first.json", entry("stream", "bf16", {"penstock:bf16": batch(1.0, 20.0)}, {"penstock:bf16": 1.1}))
    found = rows(table("peers", "bf16 | first.json, one.json (2) | bf16", results))
    assert found[2] == ["A, one stream: decoding", "20.0 tok/s (`bf12` 31.7 (2))", "-", "-", "1.10x (1.23x (2))"]
    assert found[3][0] == f"{TITLES['batch']}: all, decoding alone (2)"


def test_instruction_sets_by_variant(results: Path) -> None:
    engines = {
        "penstock/avx2:w8a8": seconds(1.2),
        "penstock/avx2:bf16": seconds(0.7812),
        "penstock/torch:bf16": seconds(0.4818),
        "penstock/avx512_bf16:bf16": seconds(0.35, times=1),
    }
    many = {"penstock/avx2:bf16": batch(52.27, 122.07), "penstock/torch:bf16": batch(60.23, 89.04)}
    save(results / "k.json", entry("ttft", "bf16", engines, {}), entry("batch", "bf16", many, {}))
    assert rows(table("kernels", "sets | k.json | bf16", results)) == [
        ["sets", "torch", "`avx512_bf16`", "`avx2`"],
        ["---"] * 4,
        ["A, bf16, 32 x (128 in / 64 out): all, decoding alone", "60.2, 89.0 tok/s", "-", "52.3, 122 (0.87x, 1.37x)"],
        ["A, bf16, first token", "482 ms", "350 (1) (1.38x)", "781 (0.62x)"],
        ["A, `w8a8`, first token", "-", "-", "1,200 ms"],
    ]


def test_blocks_are_replaced_and_the_first_stale_one_is_named(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = results / "page.md"
    first, second = "<!-- peers: bf16 | one.json | bf16 -->", "<!-- peers: 8 | one.json | 8bit -->"
    page.write_text(
        f"before\n\n{first}\n<!-- end -->\n\nbetween\n\n{second}\nold\n<!-- end -->\nbehind\n", encoding="utf-8"
    )
    options = ["--page", str(page), "--results", str(results)]
    assert main(["--check", *options]) == 1
    assert first in capsys.readouterr().out
    assert "old" in page.read_text(encoding="utf-8")
    assert main(options) == 0
    assert main(["--check", *options]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{first}\n\n| bf16 |")
    assert text.endswith("|\n\n<!-- end -->\nbehind\n")
    assert "old" not in text and "\n\nbetween\n\n" in text
    assert written(text, results) == text
    assert stale(text.replace("208, 440", "209, 440"), results) == second


@pytest.mark.parametrize(
    "opening",
    [
        "<!-- peers: bf16 | none.json | bf16 -->\n<!-- end -->",
        "<!-- peers: bf16 | one.json | 3bit -->\n<!-- end -->",
        "<!-- peers: bf16 | one.json | 4bit -->\n<!-- end -->",
        "<!-- peers: one.json bf16 -->\n<!-- end -->",
        "<!-- peers bf16 | one.json | bf16 -->\n<!-- end -->",
        "<!-- peers: bf16 | one.json | bf16 -->\n",
    ],
)
def test_what_cannot_be_made_is_refused_by_name(opening: str, results: Path) -> None:
    good = "<!-- peers: good | one.json | bf16 -->\n<!-- end -->\n"
    with pytest.raises(Malformed) as refused:
        written(f"{opening}\n\n{good}", results)
    assert opening.splitlines()[0] in str(refused.value)


def test_the_page_has_what_its_results_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert stale(text, RESULTS) is None, "run: python benchmarks/peers/table.py"
    assert main(["--check"]) == 0
    assert text.count("<!-- peers: ") >= 3 and text.count("<!-- kernels: ") >= 1
