"""Writes the tables of docs/benchmarks.md that tell results of run.py, each between two comments:

    <!-- peers: first column's head | peers.json, peers_b.json (2) | bf16 8bit -->
    <!-- end -->

    .venv/bin/python benchmarks/peers/table.py            # all between the comments is written anew
    .venv/bin/python benchmarks/peers/table.py --check    # writes nothing; fails and names the first stale block

Between the bars: files of benchmarks/results, then groups. A work that several files have is told by the first of them;
later ones only add works, and variants of penstock beside the peers of their own run. Rows and variants of a file with
a mark, here (2), bear it. `kernels:` instead of `peers:` compares penstock's instruction sets with one another. Cells
are decoding tokens a second for one stream, all output tokens a second and decoding alone for batches, else the time.
(1): measured in fewer rounds than the rest, or started once. -: not measured. Ratios above 1: penstock is faster.

Rounding, of every figure and ratio: three significant digits, but all digits before the point and no more than two
behind it; a half away from zero; of decimals as the file has them, for seconds below one in ms. Ratios are the file's
`ratio_over_best_peer`; over the best peer's decoding, and over torch, quotients of the file's figures.

Knows result files and Markdown only: it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"

OURS = "penstock"
PEERS = {"llamacpp": "llama.cpp", "openvino": "OpenVINO", "vllm": "vLLM", "transformers": "transformers"}
KERNELS = ("torch", "amx", "avx512_bf16", "avx512", "avx2")  # columns; the first is what the others are compared with
WORKS = ("stream", "batch", "prefill", "ttft", "shared", "b32", "b256", "startup")  # rows, as in works.py
GROUPS = {"bf16": "bf16", "8bit": "8 bits", "4bit": "4 bits"}
VARIANTS = {"bf16": ("bf16", "bf12"), "8bit": ("w8a8", "w8a8c8"), "4bit": ("w4a8", "int4")}
ONE_STREAM_ONLY = ("bf12",)
SLOW = " (1)"
NONE = "-"

BLOCK = re.compile(r"^(<!-- (peers|kernels): (.*) -->\n)((?:(?!<!-- ).*\n)*)<!-- end -->$", re.MULTILINE)
OPENING = re.compile(r"^<!-- *(?:peers|kernels)\b.*", re.MULTILINE)
FILE = re.compile(r"([\w.-]+\.json)(?: (\(\d+\)))?")


class Malformed(Exception):
    """The page asks for a table that cannot be made; says which and why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One work of one group, as one file has it. Numbers are `Decimal`, or int."""

    entry: dict[str, Any]
    rounds: int
    mark: str  # of the file

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        return self.entry["engines"]  # type: ignore[no-any-return]

    @property
    def keys(self) -> list[str]:
        """Which figures a cell tells."""
        if self.entry["figure"] == "decode":
            return ["decode_tokens_per_s"]
        if self.entry["figure"] == "seconds":
            return ["median_s"]
        decoding = any("decode_tokens_per_s" in figures for figures in self.engines.values())
        return ["output_tokens_per_s", *["decode_tokens_per_s"][: int(decoding)]]

    @property
    def unit(self) -> str:
        """One for the whole row, so that its figures can be compared."""
        if self.entry["figure"] != "seconds":
            return "tok/s"
        return "ms" if min(figures["median_s"] for figures in self.engines.values()) < 1 else "s"

    def label(self, words: str) -> str:
        """The row's name, with `words` behind the model's."""
        title: str = self.entry["title"]
        if words:
            model, _, rest = title.partition(", ")
            title = f"{model}, {words}, {rest}"
        told = {"decode_tokens_per_s": ": decoding", "output_tokens_per_s decode_tokens_per_s": ": all, decoding alone"}
        mark = f" {self.mark}" if self.mark else ""
        return title + told.get(" ".join(self.keys), "") + mark

    def figures(self, engine: str, unit: str) -> str:
        """What a cell says of an engine that was measured; `unit` as it is to be shown, perhaps empty."""
        found = self.engines[engine]
        factor = 1000 if self.unit == "ms" else 1
        told = ", ".join(rounded(found[key] * factor) for key in self.keys)
        return told + (f" {unit}" if unit else "") + (SLOW if self._is_slow(found) else "")

    def _is_slow(self, found: dict[str, Any]) -> bool:
        num = len(found["seconds"])
        return num == 1 if self.entry["work"] == "startup" else num < self.rounds

    def over_peers(self, engine: str) -> str:
        """How often the fastest peer's speed one of ours has; for batches also that of the fastest in decoding."""
        ratio = self.entry["ratio_over_best_peer"].get(engine)
        if ratio is None:
            return NONE
        ratios = [ratio]
        if len(self.keys) == 2:
            key = self.keys[1]
            theirs = [found[key] for name, found in self.engines.items() if _peer(name) != OURS and key in found]
            ratios.append(Decimal(self.engines[engine][key]) / max(theirs))
        best = self.entry.get("best_peer")
        mark = SLOW if best and self._is_slow(self.engines[best]) else ""
        return ", ".join(f"{rounded(each)}x" for each in ratios) + mark

    def over_engine(self, engine: str, other: str) -> str:
        pairs = [(Decimal(self.engines[engine][key]), Decimal(self.engines[other][key])) for key in self.keys]
        if self.entry["figure"] == "seconds":
            pairs = [(theirs, ours) for ours, theirs in pairs]
        return ", ".join(f"{rounded(ours / theirs)}x" for ours, theirs in pairs)


def rounded(value: Decimal | int) -> str:
    """By the one rule that the file's docstring states."""
    exact = Decimal(value)
    places = 2 - exact.adjusted() if exact else 2
    for digits in (places, places - 1):  # the second where rounding brings one more digit before the point: 99.96
        shown = exact.quantize(Decimal(1).scaleb(-max(0, min(2, digits))), ROUND_HALF_UP)
        if shown.adjusted() == exact.adjusted():
            break
    return f"{shown:,}"


def _peer(engine: str) -> str:
    return re.split("[:/]", engine)[0]


def _named(variant: str, group: str) -> str:
    return variant if variant == group else f"`{variant}`"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """Without the columns that no row has anything in."""
    kept = [n for n in range(len(heads)) if n == 0 or any(row[n] != NONE for row in rows)]
    lines = [[heads[n] for n in kept], None, *[[row[n] for n in kept] for row in rows]]
    return "".join("|" + ("---|" * len(kept) if line is None else f" {' | '.join(line)} |") + "\n" for line in lines)


# ---- the two kinds of tables; `works` maps (group, work) to what each file has of it, the first file's first ----

Works = dict[tuple[str, str], list[Measured]]


def peers_table(head: str, works: Works, several_groups: bool) -> str:
    rows = []
    for (group, _), sources in works.items():
        first = sources[0]
        unit = first.unit
        ours, ratios = _our_cells(group, sources)
        cells = [ours]
        for peer in PEERS:
            if any(cell != NONE for cell in cells):
                unit = ""  # the row's first figure has told it
            engine = next((name for name in first.engines if _peer(name) == peer), None)
            cells.append(first.figures(engine, unit) if engine else NONE)
        rows.append([first.label(GROUPS[group] if several_groups else ""), *cells, ratios])
    return _table([head, OURS, *PEERS.values(), "over the fastest"], rows)


def _our_cells(group: str, sources: list[Measured]) -> tuple[str, str]:
    """Figures and ratios of penstock's variants: the group's first one, the others in parentheses."""
    figures: list[str] = []
    ratios: list[str] = []
    for variant in VARIANTS[group]:
        engine = f"{OURS}:{variant}"
        source = next((each for each in sources if engine in each.engines), None)
        if source is None or (variant in ONE_STREAM_ONLY and source.entry["figure"] != "decode"):
            continue
        name = "" if variant == group else f"{_named(variant, group)} "
        added = f" {source.mark}" if source.mark and source is not sources[0] else ""
        figures.append(name + source.figures(engine, "" if figures else source.unit) + added)
        ratios.append(source.over_peers(engine) + added)
    told = []
    for each in (figures, ratios):
        others = f" ({'; '.join(each[1:])})" if each[1:] else ""
        told.append(each[0] + others if each else NONE)
    return told[0], told[1]


def kernels_table(head: str, works: Works, _several_groups: bool) -> str:
    found: dict[tuple[str, str, int], list[str]] = {}
    known = {_kernels(name) for sources in works.values() for each in sources for name in each.engines}
    columns = [*KERNELS, *sorted(known - {*KERNELS, ""})]
    for (group, work), sources in works.items():
        for source in sources:
            for variant in {name.partition(":")[2] for name in source.engines if _kernels(name)}:
                key = (group, variant, WORKS.index(work))
                found.setdefault(key, _kernels_row(source, variant, group, columns))
    order = sorted(found, key=lambda key: (list(GROUPS).index(key[0]), *key[1:]))
    return _table([head, *[KERNELS[0], *[f"`{each}`" for each in columns[1:]]]], [found[key] for key in order])


def _kernels_row(source: Measured, variant: str, group: str, columns: list[str]) -> list[str]:
    row = [source.label(_named(variant, group))]
    base = f"{OURS}/{columns[0]}:{variant}"
    unit = source.unit
    for column in columns:
        engine = f"{OURS}/{column}:{variant}"
        if engine not in source.engines:
            row.append(NONE)
            continue
        ratio = f" ({source.over_engine(engine, base)})" if engine != base and base in source.engines else ""
        row.append(source.figures(engine, unit) + ratio)
        unit = ""
    return row


def _kernels(engine: str) -> str:
    """Of one of ours that was told its instruction set, that; else nothing."""
    peer, _, rest = engine.partition("/")
    return rest.partition(":")[0] if peer == OURS else ""


# ---- the page ----

KINDS = {"peers": peers_table, "kernels": kernels_table}


def table(kind: str, asked: str, results: Path) -> str:
    """The table that a block's first comment asks for."""
    parts = [part.strip() for part in asked.split("|")]
    if len(parts) != 3:
        raise Malformed("it takes a head, files and groups, with | between them")
    head, files, groups = parts[0], parts[1].split(","), parts[2].split()
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise Malformed(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    works: Works = {}
    for file in files:
        for measured in _read(file.strip(), results):
            works.setdefault((measured.entry["group"], measured.entry["work"]), []).append(measured)
    order = [(group, work) for group in groups for work in WORKS if (group, work) in works]
    if not order:
        raise Malformed("the files have no work of these groups")
    return KINDS[kind](head, {key: works[key] for key in order}, len(groups) > 1)


def _read(file: str, results: Path) -> Iterator[Measured]:
    match = FILE.fullmatch(file)
    if match is None or not (results / match[1]).is_file():
        raise Malformed(f"no such result: {file}")
    result = json.loads((results / match[1]).read_text(encoding="utf-8"), parse_float=Decimal)
    for entry in result["works"]:
        if entry["work"] not in WORKS:
            raise Malformed(f"{file}: a work that has no place among the rows: {entry['work']}")
        if entry["engines"]:
            yield Measured(entry, result["rounds"], match[2] or "")


def blocks(text: str, results: Path) -> Iterator[tuple[re.Match[str], str]]:
    """Every block of a page, with what is to be between its comments."""
    found = list(BLOCK.finditer(text))
    for n, opening in enumerate(OPENING.finditer(text)):
        if n >= len(found) or found[n].start() != opening.start():
            raise Malformed(f"{opening[0]}: malformed, or without an end")
    for match in found:
        try:
            yield match, f"\n{table(match[2], match[3], results)}\n"
        except Malformed as wrong:
            raise Malformed(f"{match[1].strip()}: {wrong}") from wrong


def stale(text: str, results: Path) -> str | None:
    """The comment that opens the first block that is not what its files say."""
    return next((match[1].strip() for match, body in blocks(text, results) if match[4] != body), None)


def written(text: str, results: Path) -> str:
    """The page with all blocks as their files say."""
    parts, at = [], 0
    for match, body in blocks(text, results):
        parts += [text[at : match.start(4)], body]
        at = match.end(4)
    return "".join(parts) + text[at:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a block is stale")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    text = args.page.read_text(encoding="utf-8")
    try:
        if args.check:
            found = stale(text, args.results)
            print(f"{args.page.name}: stale: {found}" if found else f"{args.page.name} is as its results say")
            return 1 if found else 0
        args.page.write_text(written(text, args.results), encoding="utf-8")
    except Malformed as wrong:
        print(f"{args.page.name}: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
