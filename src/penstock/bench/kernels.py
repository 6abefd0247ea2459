"""`penstock bench kernels`: each native kernel beside what the machine can do, both measured in the same run.

What a model's layers stream (weights, keys and values) comes from memory here too: different ones are read in turns. A
figure's share is of the roofline: the larger of the time to read its bytes once and the time for its products from the
nearest cache. Kernels that work on what lies in caches have no share. What each one does: kernel_weights.py and
kernel_tokens.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from penstock.bench.flags import machine, parse, write_json
from penstock.bench.kernel_ceilings import Bench
from penstock.bench.kernel_tokens import BLOCK, Caches, norm, pool_bytes, quantize, quantized_widths
from penstock.bench.kernel_weights import BITS, HEAD_FORMATS, Heads, Products, lookup_plain, shapes
from penstock.config.flags import FlagParser
from penstock.config.hardware import probe
from penstock.config.load import model_directory
from penstock.config.model import ModelConfig, load_model_config
from penstock.config.values import ConfigError, suggestion
from penstock.nn.kernels.native import FORMATS, load_native, usable_kernels
from penstock.nn.kernels.native_recording import COLUMNS, KV_FORMATS, Unsupported

MAX_THREADS = 1024
MAX_ROWS = 1 << 16
MAX_CONTEXT = 1 << 24
PARTS = ("products", "attention", "rows", "head")
DESCRIPTION = """Native kernels beside the ceilings of this machine, measured in the same run. products: of a layer, in
each format; "add" adds to the residual, "silu" multiplies the halves of gate and up. attention: of decoding rows. rows:
norm (residual to bf16, nothing is added), quantize (of inputs, for formats that end in a8), heads (norm and rotary
embedding of q and k, k and v into the cache), embed (a table's rows, or those of the packed head). head: scores of the
whole vocabulary, then tokens chosen in the same call, greedy and with temperature, top-k and top-p."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is measured: which of PARTS, and the lists that these go through."""

    parts: list[str]
    formats: list[str]
    kv_dtypes: list[str]
    rows: list[int]
    contexts: list[int]
    batches: list[int]

    @property
    def head_formats(self) -> list[str]:
        return list(dict.fromkeys(HEAD_FORMATS[name] for name in self.formats))

    @property
    def ceilings(self) -> list[str]:
        """Formats whose rate of products is needed."""
        wanted = [name for name in self.formats if "products" in self.parts]
        wanted += [name for name in self.head_formats if "head" in self.parts]
        wanted += ["bf16" for part in self.parts if part == "attention"]
        return [name for name in FORMATS if name in wanted]


def main(arguments: list[str]) -> int:
    parser = FlagParser(prog="penstock bench kernels", description=DESCRIPTION, sections=())
    parser.add_argument("--model", default="penstock-tiny", metavar="DIR", help="whose shapes [penstock-tiny]")
    parser.add_argument("--only", default=",".join(PARTS), metavar="LIST", help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--formats", default=",".join(BITS), metavar="LIST", help="weight formats [all]")
    parser.add_argument(
        "--rows", default="1,4,32,128,512", metavar="LIST", help="rows of a product, tokens [1,4,32,128,512]"
    )
    parser.add_argument("--contexts", default="128,1024,8192", metavar="LIST", help="[128,1024,8192]")
    parser.add_argument(
        "--batches", default="1,32", metavar="LIST", help="decoding rows: of attention, heads, the head [1,32]"
    )
    parser.add_argument(
        "--kv-cache-dtypes", default=",".join(KV_FORMATS), metavar="LIST", help="of the cache [bfloat16,int8]"
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
    wanted = Wanted(
        _names(options.only, PARTS, "--only", "kernels"),
        _names(options.formats, tuple(FORMATS), "--formats", "format"),
        _names(options.kv_cache_dtypes, tuple(KV_FORMATS), "--kv-cache-dtypes", "dtype"),
        _numbers(options.rows, "--rows", MAX_ROWS),
        _numbers(options.contexts, "--contexts", MAX_CONTEXT),
        _numbers(options.batches, "--batches", MAX_ROWS),
    )
    config = load_model_config(model_directory(options.model))
    here = probe()
    _check(config, wanted, here.memory_free_bytes)
    bench = Bench(options.kernels or usable[0], options.num_threads or here.num_cores, options.rounds)
    bench.measure_ceilings(wanted.ceilings)
    print(f"{bench.kernels} kernels, {bench.num_threads} threads; reads {bench.ceilings.read / 1e9:.1f} GB/s")
    for name, rate in bench.ceilings.products.items():
        print(f"  products of {name} from the nearest cache: {rate / 1e9:.0f} G operations/s")
    rows = []
    print(f"{'kernel':<18} {'shape':<22} {'rows':>5} {'us':>9} {'GB/s':>7} {'Gop/s':>7} {'of roofline':>12}")
    for row in _measured(bench, config, wanted):
        rows.append(row)
        _tell(row)
    if options.output_json:
        facts = {
            "kernels": bench.kernels,
            "num_threads": bench.num_threads,
            "read_gb_per_s": bench.ceilings.read / 1e9,
            "product_g_operations_per_s": {name: rate / 1e9 for name, rate in bench.ceilings.products.items()},
        }
        write_json(options.output_json, {**machine(), **facts, "model": options.model, "rows": rows})
    return 0


def _measured(bench: Bench, config: ModelConfig, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Part by part; what a part takes of memory is given back before the next."""
    if "products" in wanted.parts:
        for name in wanted.formats:
            yield from Products(bench, config, name).rows(wanted.rows)
    if {"attention", "rows"} & set(wanted.parts):
        for dtype in wanted.kv_dtypes:
            yield from _cached(Caches(bench, config, dtype, _sizes(wanted)), wanted)
    if "rows" in wanted.parts:
        yield from (norm(bench, config, count) for count in wanted.rows)
        if any(name.endswith("a8") for name in wanted.formats):
            for width, rotation in quantized_widths(config):
                yield from (quantize(bench, width, rotation, count) for count in wanted.rows)
        yield from (lookup_plain(bench, config, count) for count in wanted.rows)
    if {"head", "rows"} & set(wanted.parts):
        for name in wanted.head_formats:
            yield from _with_head(Heads(bench, config, name), wanted)


def _cached(caches: Caches, wanted: Wanted) -> Iterator[dict[str, Any]]:
    if "attention" in wanted.parts:
        for batch in wanted.batches:
            yield from (caches.attention(batch, context) for context in wanted.contexts)
    if "rows" in wanted.parts:
        yield from (caches.prompt(count) for count in wanted.rows)
        yield from (caches.decoding(batch) for batch in wanted.batches)


def _with_head(heads: Heads, wanted: Wanted) -> Iterator[dict[str, Any]]:
    if "rows" in wanted.parts:
        yield from (heads.lookup(count) for count in wanted.rows)
    if "head" in wanted.parts:
        for batch in wanted.batches:
            yield heads.scores(batch)
            yield from heads.choices(batch)


def _sizes(wanted: Wanted) -> list[int]:
    """KV blocks that layers have in what is measured."""
    sizes = []
    if "attention" in wanted.parts:
        sizes += [batch * -(-context // BLOCK) for batch in wanted.batches for context in wanted.contexts]
    if "rows" in wanted.parts:
        sizes += [*wanted.batches, *(-(-count // BLOCK) for count in wanted.rows)]
    return sizes


def _check(config: ModelConfig, wanted: Wanted, memory_bytes: int) -> None:
    """Raises ConfigError for a model that native kernels do not take, and for what does not fit in memory."""
    if config.head_dim % COLUMNS or config.head_dim > 256:
        raise ConfigError(f"native kernels need heads of a multiple of 16 up to 256, not {config.head_dim}", "--model")
    if config.intermediate_size % COLUMNS:
        what = f"a feed-forward width of a multiple of {COLUMNS}, not {config.intermediate_size}"
        raise ConfigError(f"native kernels need {what}", "--model")
    widths = sum(num_out + num_in for num_out, num_in in shapes(config))
    scores = 4 * max(wanted.batches) * config.vocab_size if "head" in wanted.parts else 0
    for num_bytes, flag in ((4 * max(wanted.rows) * widths, "--rows"), (2 * scores, "--batches")):
        if num_bytes > memory_bytes > 0:
            what = f"results take {num_bytes / 1e9:.1f} GB, of memory {memory_bytes / 1e9:.1f} GB are free"
            raise ConfigError(what, flag)
    if sizes := _sizes(wanted):
        pools = max(pool_bytes(config, dtype, max(sizes)) for dtype in wanted.kv_dtypes)
        if pools > memory_bytes > 0:
            what = f"keys and values take {pools / 1e9:.1f} GB, of memory {memory_bytes / 1e9:.1f} GB are free"
            raise ConfigError(what, "--contexts")


def _tell(row: dict[str, Any]) -> None:
    operations, share, us, rate = (row[k] for k in ("g_operations_per_s", "share_of_roofline", "us", "gb_per_s"))
    print(
        f"{row['kernel']:<18} {row['shape']:<22} {row['rows']:>5} {us:>9.{2 if us < 10 else 1}f} "
        f"{rate:>7.{2 if rate < 1 else 1}f} "
        f"{'-' if operations is None else format(operations, '.0f'):>7} "
        f"{'-' if share is None else format(share, '.0%'):>7} {row['bound']}"
    )
    sys.stdout.flush()


def _names(text: str, known: tuple[str, ...], flag: str, what: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in known:
            near = suggestion(name, known)
            raise ConfigError(f"unknown {what} {name or repr(name)}; there are {', '.join(known)}{near}", flag)
    return found


def _numbers(text: str, flag: str, most: int) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"a list of whole numbers, not {text!r}", flag) from None
    if min(found) < 1:
        raise ConfigError("must be at least 1", flag)
    if max(found) > most:
        raise ConfigError(f"{max(found)} is more than {most}", flag)
    return found
