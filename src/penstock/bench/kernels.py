"""`penstock bench kernels`: each native kernel beside what the machine can do, both measured in the same run.

Matrix products of a model's shapes stream different weights in turns, as a model's layers do, so that these come from
memory. Attention reads its keys and values from a pool that no cache holds. A figure's share is of the roofline: the
larger of the time to read the bytes once and the time for the products from the nearest cache.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from penstock.bench.flags import machine, parse, write_json
from penstock.config.flags import FlagParser
from penstock.config.hardware import probe
from penstock.config.load import model_directory
from penstock.config.model import KVGroup, KVLayout, ModelConfig, load_model_config
from penstock.config.values import ConfigError
from penstock.nn.kernels.native import FORMATS, load_native, usable_kernels
from penstock.nn.kernels.native_recording import BF16, COLUMNS, KV_FORMATS, Unsupported
from penstock.runner.kv_store import KVStore

STREAMED_BYTES = 320 << 20  # of weights in turns, of keys and values: more than caches hold
READ_BYTES = 1 << 30
BITS = {"bf16": 16, "int8": 8, "w8a8": 8, "int4": 4.25, "w4a8": 4.25, "bf12": 12}
BLOCK = 32
MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of this machine with this team: bytes per second from memory, operations per second by format."""

    read: float
    products: dict[str, float]


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock bench kernels",
        description="Native kernels beside the ceilings of this machine, measured in the same run.",
        sections=(),
    )
    parser.add_argument("--model", default="penstock-tiny", metavar="DIR", help="whose shapes [penstock-tiny]")
    parser.add_argument("--formats", default=",".join(BITS), metavar="LIST", help="weight formats [all]")
    parser.add_argument("--rows", default="1,4,32,128,512", metavar="LIST", help="rows of a product [1,4,32,128,512]")
    parser.add_argument("--contexts", default="128,1024,8192", metavar="LIST", help="[128,1024,8192]")
    parser.add_argument("--batches", default="1,32", metavar="LIST", help="decoding rows of attention [1,32]")
    parser.add_argument(
        "--kv-cache-dtypes", default=",".join(KV_FORMATS), metavar="LIST", help="of attention [bfloat16,int8]"
    )
    parser.add_argument("--kernels", default=None, metavar="NAME", help="instruction set [the best here]")
    parser.add_argument("--num-threads", type=int, default=None, metavar="N", help="[the cores of this process]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements; the median counts [5]")
    parser.add_argument("--output-json", metavar="FILE", help="write the figures as JSON")
    options = parse(parser, arguments)
    if options is None:
        return 0
    usable = usable_kernels()
    try:
        load_native()
        if not usable or options.kernels not in (None, *usable):
            raise Unsupported(f"no such kernels here; usable: {', '.join(usable) or 'none'}")
    except Unsupported as error:
        raise ConfigError(str(error), "--kernels") from None
    for flag, number in (("--num-threads", options.num_threads), ("--rounds", options.rounds)):
        if number is not None and number < 1:
            raise ConfigError(f"{number} is not at least 1", flag)
    if options.num_threads is not None and options.num_threads > MAX_THREADS:
        raise ConfigError(f"{options.num_threads} is more than {MAX_THREADS}", "--num-threads")
    config = load_model_config(model_directory(options.model))
    if config.head_dim % COLUMNS or config.head_dim > 256:
        raise ConfigError(f"native kernels need heads of a multiple of 16 up to 256, not {config.head_dim}", "--model")
    bench = Bench(options.kernels or usable[0], options.num_threads or probe().num_cores, options.rounds)
    formats = options.formats.split(",")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"unknown format {unknown[0]}; there are {', '.join(FORMATS)}", "--formats")
    kv_dtypes = options.kv_cache_dtypes.split(",")
    if unknown := [name for name in kv_dtypes if name not in KV_FORMATS]:
        raise ConfigError(f"unknown dtype {unknown[0]}; there are {', '.join(KV_FORMATS)}", "--kv-cache-dtypes")
    ceilings = bench.ceilings(formats)
    print(f"{bench.kernels} kernels, {bench.num_threads} threads; reads {ceilings.read / 1e9:.1f} GB/s")
    for name, rate in ceilings.products.items():
        print(f"  products of {name} from the nearest cache: {rate / 1e9:.0f} G operations/s")
    rows: list[dict[str, Any]] = []
    print(f"{'kernel':<18} {'shape':<22} {'rows':>5} {'us':>9} {'GB/s':>7} {'Gop/s':>7} {'of roofline':>12}")
    for name in formats:
        for num_out, num_in in shapes(config):
            for num_rows in _numbers(options.rows, "--rows"):
                rows.append(bench.product(name, num_out, num_in, num_rows, ceilings))
                _tell(rows[-1])
    for batch in _numbers(options.batches, "--batches"):
        for context in _numbers(options.contexts, "--contexts"):
            for kv_dtype in kv_dtypes:
                rows.append(bench.attention(config, kv_dtype, batch, context, ceilings))
                _tell(rows[-1])
    if options.output_json:
        facts = {"kernels": bench.kernels, "num_threads": bench.num_threads, "read_gb_per_s": ceilings.read / 1e9}
        write_json(options.output_json, {**machine(), **facts, "model": options.model, "rows": rows})
    return 0


def shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of the projections of a layer."""
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    hidden, inter = config.hidden_size, config.intermediate_size
    return list(dict.fromkeys(((qkv, hidden), (hidden, heads), (2 * inter, hidden), (hidden, inter))))


class Bench:
    """Measurements with one instruction set and one team."""

    def __init__(self, kernels: str, num_threads: int, rounds: int) -> None:
        self.kernels, self.num_threads, self.rounds = kernels, num_threads, rounds
        self._native = load_native()
        self._team = self._native.Team(num_threads, [])

    def ceilings(self, formats: list[str]) -> Ceilings:
        products = {name: self._native.product_rate(self.kernels, self._team, FORMATS[name]) for name in formats}
        return Ceilings(self._native.read_rate(self._team, READ_BYTES), products)

    def product(self, name: str, num_out: int, num_in: int, num_rows: int, ceilings: Ceilings) -> dict[str, Any]:
        """One product of the format, the median over rounds of the mean over different weights."""
        num_bytes = num_out * num_in * BITS[name] / 8
        program = self._native.Program(self.kernels, self._team, num_rows)
        source, to = program.buffer(BF16, num_in), program.buffer(BF16, num_out)
        kept = []
        values = torch.randn(num_out, num_in).bfloat16().view(torch.uint16).numpy()
        for _ in range(max(2, min(64, int(STREAMED_BYTES / num_bytes)))):
            weight = self._native.PackedWeight(FORMATS[name], num_out, num_in)
            weight.fill(self._team, 0, values)
            program.linear(weight, source, to)
            kept.append(weight)
        spans = np.array([0, num_rows]), np.array([0])
        tokens = np.zeros(num_rows, np.int64)
        seconds = self._median(program, "linear", lambda: program.run(tokens, tokens, *spans, []))
        return _row(name, f"{num_out} x {num_in}", num_rows, seconds, num_bytes, 2.0 * num_out * num_in * num_rows,
                    ceilings.read, ceilings.products[name])  # fmt: skip

    def attention(
        self, config: ModelConfig, kv_dtype: str, batch: int, context: int, ceilings: Ceilings
    ) -> dict[str, Any]:
        """One layer's attention of `batch` decoding rows, each with `context` tokens of its own."""
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        blocks = -(-context // BLOCK)
        group = KVGroup(0, "full", (0,), None, BLOCK, kv_heads, dim, kv_dtype)
        block_bytes = group.layer_bytes
        num_bytes = batch * context * block_bytes / BLOCK
        layers = max(2, min(64, STREAMED_BYTES // (batch * blocks * block_bytes)))
        program = self._native.Program(self.kernels, self._team, batch)
        qkv, to = program.buffer(BF16, (heads + 2 * kv_heads) * dim), program.buffer(BF16, heads * dim)
        kept = []
        for _ in range(layers):
            store = KVStore(KVLayout((group,)), (1 + batch * blocks,), torch.device("cpu"))
            bytes_of_pool = store.pools[0].view(torch.uint8).view(-1, block_bytes)
            bytes_of_pool.zero_()  # untouched memory would be read from one page
            pool = program.pool(bytes_of_pool.numpy(), kv_heads, dim, 0, 0, KV_FORMATS[kv_dtype])
            program.attend(qkv, heads, pool, 1.0, to)
            kept.append(store)
        table = np.arange(1, 1 + batch * blocks, dtype=np.int32).reshape(batch, blocks)
        positions = np.full(batch, context - 1)
        spans = np.arange(batch + 1), positions
        tokens = np.zeros(batch, np.int64)
        seconds = self._median(program, "attend", lambda: program.run(tokens, positions, *spans, [table]))
        operations = 4.0 * batch * context * heads * dim
        rate = ceilings.products.get("bf16") or self._native.product_rate(self.kernels, self._team, FORMATS["bf16"])
        shape = f"{heads}/{kv_heads} x {dim}, {context}"
        return _row(f"attention {kv_dtype}", shape, batch, seconds, num_bytes, operations, ceilings.read, rate)

    def _median(self, program: Any, operation: str, run: Any) -> float:
        run()
        means = []
        for _ in range(self.rounds):
            program.clear_seconds()
            run()
            means.append(statistics.mean(seconds for name, seconds in program.seconds() if name == operation))
        return statistics.median(means)


def _row(
    kernel: str, shape: str, rows: int, seconds: float, num_bytes: float, operations: float, read: float, rate: float
) -> dict[str, Any]:
    roofline_s = max(num_bytes / read, operations / rate)
    return {
        "kernel": kernel,
        "shape": shape,
        "rows": rows,
        "us": round(seconds * 1e6, 1),
        "gb_per_s": round(num_bytes / seconds / 1e9, 1),
        "g_operations_per_s": round(operations / seconds / 1e9, 1),
        "share_of_roofline": round(roofline_s / seconds, 3),
        "bound": "memory" if num_bytes / read > operations / rate else "products",
    }


def _tell(row: dict[str, Any]) -> None:
    print(
        f"{row['kernel']:<18} {row['shape']:<22} {row['rows']:>5} {row['us']:>9.1f} {row['gb_per_s']:>7.1f} "
        f"{row['g_operations_per_s']:>7.0f} {row['share_of_roofline']:>7.0%} {row['bound']}"
    )
    sys.stdout.flush()


def _numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"a list of whole numbers, not {text!r}", flag) from None
    if not found or min(found) < 1:
        raise ConfigError("must be at least 1", flag)
    return found
