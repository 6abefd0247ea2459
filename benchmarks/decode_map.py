"""How close does decoding come to what the machine allows, over batch sizes and contexts?

    .venv/bin/python benchmarks/decode_map.py --out benchmarks/results/decode_map.json --picture docs/decode_map.svg

Runs decode steps of the native model, head and greedy choice included, scheduler and server not. Nothing is prefilled:
the KV pool is filled with random numbers, every row gets blocks of its own in it, and is said to be at the end of its
context. The time of a step is compared with the roofline, max(bytes / bandwidth, operations / peak): bytes are the
packed weights once and the keys and values of every row; bandwidth and peak are measured before each batch size
(native ceilings: reading memory, products from the nearest cache). A small model's weights stay partly in caches, so
that its share may exceed 1. The map is walked twice and the faster step counts: a neighbour on the machine can only
slow one down. Cells whose KV does not fit in --kv-gib are skipped and listed. Prints shares as a table
and the cells under 60 % with the operation that takes most; --out writes JSON, --picture draws it (extra `bench`:
matplotlib), also from an earlier result with --from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_shapes import TITLES, model_settings
from step_profile import operation_seconds

from penstock.bench.flags import machine, write_json
from penstock.build.engine import QUANTIZATION
from penstock.config.complete import complete
from penstock.config.hardware import probe
from penstock.config.load import resolve
from penstock.config.model import ModelConfig
from penstock.nn.doors import Batch, Spans
from penstock.nn.kernels.edits import NO_IDS, RowParams
from penstock.nn.kernels.native import FORMATS, NativeAttention, NativeModel, PackedWeights, load_native, usable_kernels
from penstock.nn.models import create_model
from penstock.nn.weights.create import init_dummy
from penstock.runner.kv_store import KVStore

LOW_SHARE = 0.6
READ_BYTES = 1 << 30
PATTERN_BYTES = 8 << 20  # random keys and values, over and over: the pool's memory is what must not repeat
MIN_SECONDS, MIN_STEPS = 0.25, 3  # timed per cell


class Map:
    """One model in one format: a pool of KV, and the time of a decode step anywhere on the map."""

    def __init__(
        self, settings: dict[str, Any], weight_format: str, max_batch: int, max_context: int, kv_bytes: int
    ) -> None:
        resolved = complete(resolve({**settings, "max_num_seqs": max_batch, "max_model_len": 1024}), probe())
        positions = max(max_context, resolved.model.max_position)
        self.shape: ModelConfig = replace(resolved.model, max_position=positions)
        self.layout = resolved.layout
        assert len(self.layout.groups) == 1, "models with one kind of attention"
        group = self.layout.groups[0]
        self.block_size, self.token_bytes = group.block_size, group.block_bytes // group.block_size
        self.num_blocks = kv_bytes // group.block_bytes
        torch.set_num_threads(1)
        model = create_model(self.shape, torch.bfloat16)
        init_dummy(model, 0)
        quantization = "none" if weight_format == "bf16" else weight_format
        self.kernels, self.num_threads = usable_kernels()[0], resolved.config.runtime.num_threads
        assert self.num_threads is not None
        weights = PackedWeights(model, self.num_threads, QUANTIZATION[quantization])
        self.store = KVStore(self.layout, (self.num_blocks,), torch.device("cpu"))
        _fill(self.store)
        self.model = NativeModel(
            model, weights, self.layout, self.store.pools, kernels=self.kernels, max_tokens=max_batch
        )
        self.weight_bytes = weights.num_bytes
        self.attention = NativeAttention()
        self.team, self.weight_format = weights.team, FORMATS[weight_format]
        self.read_rates: list[float] = []
        self.peaks: list[float] = []

    def measure_ceilings(self) -> None:
        """Again and again: a neighbour's share of the machine changes within minutes."""
        native = load_native()
        self.read_rates.append(native.read_rate(self.team, READ_BYTES))
        self.peaks.append(native.product_rate(self.kernels, self.team, self.weight_format))

    def fits(self, batch: int, context: int) -> bool:
        return 1 + batch * -(-context // self.block_size) <= self.num_blocks

    def roofline(self, batch: int, context: int) -> tuple[float, float]:
        """(seconds to read the bytes, seconds for the operations) of a step, at the medians of the rates."""
        s = self.shape
        heads, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        layer = s.hidden_size * (2 * heads + 2 * kv + 3 * s.intermediate_size)
        products = 2 * batch * (s.num_layers * layer + s.hidden_size * s.vocab_size)
        attention = 4 * batch * context * heads * s.num_layers
        num_bytes = self.weight_bytes + batch * context * self.token_bytes
        return num_bytes / statistics.median(self.read_rates), (products + attention) / statistics.median(self.peaks)

    def cell(self, batch: int, context: int) -> dict[str, Any]:
        """The median step of `batch` rows at the end of `context` tokens each."""
        blocks = -(-context // self.block_size)
        table = np.arange(1, 1 + batch * blocks, dtype=np.int32).reshape(batch, blocks)
        start = np.full(batch, context - 1)
        rng = np.random.default_rng(batch * 100003 + context)
        one = np.ones(batch)
        wish = RowParams(0 * one.astype(np.float32), 0 * start, one, 0 * one, np.zeros(batch, np.uint64), start + 1)
        times: list[float] = []
        operations: list[dict[str, float]] = []
        while len(times) <= MIN_STEPS or sum(times) < MIN_SECONDS:
            tokens = torch.from_numpy(rng.integers(0, self.shape.vocab_size, batch))
            self.model.clear_seconds()
            begin = time.perf_counter()
            prepared = self.attention.prepare(Spans(np.arange(batch + 1), start, (table,)))
            hidden = self.model(Batch(tokens, torch.from_numpy(start), prepared))
            layers_s = time.perf_counter() - begin
            chosen, _ = self.model.scores(hidden).choose(wish, None, NO_IDS)
            times.append(time.perf_counter() - begin)
            operations.append({**operation_seconds(self.model), "head and choice": times[-1] - layers_s})
            assert chosen.min() >= 0, "every row has a token"
        times, operations = times[1:], operations[1:]  # the first one warms up
        seconds = statistics.median(times)
        medians = {name: statistics.median(step[name] for step in operations) for name in operations[0]}
        return {
            "batch": batch,
            "context": context,
            "step_ms": round(1e3 * seconds, 3),
            "tokens_per_s": round(batch / seconds, 1),
            "operations_ms": {name: round(1e3 * value, 3) for name, value in medians.items()},
            "dominated_by": max(medians, key=lambda name: medians[name]),
        }

    def judged(self, cell: dict[str, Any]) -> dict[str, Any]:
        """The cell beside the roofline, once the ceilings are known."""
        read_s, compute_s = self.roofline(cell["batch"], cell["context"])
        roofline_ms = 1e3 * max(read_s, compute_s)
        return {
            **cell,
            "roofline_ms": round(roofline_ms, 3),
            "bound": "memory" if read_s > compute_s else "products",
            "share": round(roofline_ms / cell["step_ms"], 3),
        }


def _fill(store: KVStore) -> None:
    draw = torch.Generator().manual_seed(0)
    pattern = torch.randn(PATTERN_BYTES // 2, generator=draw).bfloat16()
    for pool in store.pools:
        for part in pool.view(-1).split(len(pattern)):
            part.copy_(pattern[: len(part)])


def measure(name: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All cells of one model."""
    batches, contexts = _numbers(args.batches), _numbers(args.contexts)
    found = Map(settings, args.format, max(batches), max(contexts), int(args.kv_gib * 2**30))
    places = [(batch, context) for batch in batches for context in contexts]
    skipped = [
        {"batch": batch, "context": context, "kv_bytes": batch * context * found.token_bytes}
        for batch, context in places
        if not found.fits(batch, context)
    ]
    fastest: dict[tuple[int, int], dict[str, Any]] = {}
    for _ in range(args.passes):
        for batch in batches:
            found.measure_ceilings()
            for place in [place for place in places if place[0] == batch and found.fits(*place)]:
                cell = found.cell(*place)
                if place not in fastest or cell["step_ms"] < fastest[place]["step_ms"]:
                    fastest[place] = cell
    cells = [found.judged(cell) for cell in fastest.values()]
    read, peak = statistics.median(found.read_rates), statistics.median(found.peaks)
    print(f"\n{TITLES[name]}, {args.format}, {found.num_threads} threads, {found.kernels} kernels: reads "
          f"{read / 1e9:.1f} GB/s, {peak / 1e9:.0f} Gop/s of products; share of roofline")  # fmt: skip
    print("batch " + "".join(f"{context:>8}" for context in contexts) + "   tokens of context")
    shares = {(cell["batch"], cell["context"]): f"{cell['share']:.0%}" for cell in cells}
    for batch in batches:
        print(f"{batch:>5} " + "".join(f"{shares.get((batch, context), '-'):>8}" for context in contexts), flush=True)
    low = [cell for cell in cells if cell["share"] < LOW_SHARE]
    print(f"{len(cells)} cells, {len(skipped)} skipped: more than {args.kv_gib:g} GiB of KV; "
          f"{len(low)} under {LOW_SHARE:.0%}")  # fmt: skip
    for cell in sorted(low, key=lambda cell: cell["share"]):
        name_of, all_ms = cell["dominated_by"], sum(cell["operations_ms"].values())
        print(f"  batch {cell['batch']:>3} x {cell['context']:>5}: {cell['share']:.0%} of {cell['bound']}, most in "
              f"{name_of} ({cell['operations_ms'][name_of] / all_ms:.0%})")  # fmt: skip
    return {
        "model": name,
        "format": args.format,
        "kernels": found.kernels,
        "num_threads": found.num_threads,
        "read_gb_per_s": round(read / 1e9, 2),
        "peak_gop_per_s": round(peak / 1e9, 1),
        "each_read_gb_per_s": [round(rate / 1e9, 2) for rate in found.read_rates],
        "each_peak_gop_per_s": [round(rate / 1e9, 1) for rate in found.peaks],
        "weight_bytes": found.weight_bytes,
        "kv_bytes_per_token": found.token_bytes,
        "kv_gib": args.kv_gib,
        "passes": args.passes,
        "cells": cells,
        "skipped": skipped,
        "low": [{key: cell[key] for key in ("batch", "context", "share", "bound", "dominated_by")} for cell in low],
    }


def draw(result: dict[str, Any], picture: Path) -> None:
    """A panel per model: the share of the roofline as colour and number, tokens per second below it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maps = result["maps"]
    figure, panels = plt.subplots(1, len(maps), figsize=(7.5 * len(maps), 5), layout="constrained", squeeze=False)
    for axes, one in zip(panels[0], maps, strict=True):
        batches = sorted({cell["batch"] for cell in one["cells"] + one["skipped"]})
        contexts = sorted({cell["context"] for cell in one["cells"] + one["skipped"]})
        shares = np.full((len(batches), len(contexts)), np.nan)
        for cell in one["cells"]:
            row, column = batches.index(cell["batch"]), contexts.index(cell["context"])
            shares[row, column] = cell["share"]
            text = f"{cell['share']:.0%}\n{cell['tokens_per_s']:,.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7)
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(contexts)), contexts)
        axes.set_yticks(range(len(batches)), batches)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("batch")
        ceilings = f"{one['read_gb_per_s']:.0f} GB/s, {one['peak_gop_per_s']:.0f} Gop/s"
        axes.set_title(f"{TITLES[one['model']]}, {one['format']}; {ceilings}", fontsize=9)
        figure.colorbar(image, ax=axes, label="share of the roofline; below: output tokens/s")
    figure.suptitle(f"decode steps, {result['machine']}, commit {result['commit']}", fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="B,A", help="A: Qwen3-0.6B's shape, B: penstock-tiny [B,A]")
    parser.add_argument("--format", default="bf16", choices=[*FORMATS])
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--contexts", default="128,256,512,1024,2048,4096,8192")
    parser.add_argument("--passes", type=int, default=2, help="over the map; of each cell the fastest counts [2]")
    parser.add_argument("--kv-gib", type=float, default=8.0, help="the pool; larger cells are skipped [8]")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--picture", type=Path, help="draw them, PNG or SVG by its name")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="draw this result, measure nothing")
    args = parser.parse_args()
    if args.source is not None:
        result = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as workdir:
            maps = [measure(name, model_settings(name, Path(workdir)), args) for name in args.models.split(",")]
        result = {**machine(), "maps": maps}
        if args.out:
            write_json(args.out, result)
    if args.picture:
        draw(result, args.picture)


if __name__ == "__main__":
    main()
