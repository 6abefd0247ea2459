"""`penstock bench latency`: one batch of equal prompts, offline, again and again: how long until the last one is done?

vLLM's flags, lines and JSON keys; as there, the prefix cache is off unless asked for. Knows flags and times;
`penstock.llm` does the work.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from rich.progress import Progress

from penstock.bench.datasets import Vocabulary
from penstock.bench.flags import ENGINE_SECTIONS, add_model, engine_config, machine, open_llm, parse, write_json
from penstock.config.flags import FlagParser
from penstock.config.values import ConfigError
from penstock.core.request import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock bench latency",
        description="One batch offline, again and again: seconds until its last token.",
        sections=ENGINE_SECTIONS,
    )
    add_model(parser)
    for name, default, text in (
        ("input-len", 32, "prompt tokens"),
        ("output-len", 128, "output tokens"),
        ("batch-size", 8, "prompts at once"),
        ("n", 1, "outputs per prompt"),
        ("num-iters-warmup", 10, "batches before the clock starts"),
        ("num-iters", 30, "measured batches"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} [{default}]")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest token [1]")
    parser.add_argument("--disable-detokenize", action="store_true", help="token ids only, no text")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    parser.add_argument("--output-json", metavar="FILE", help="write the figures as JSON")
    options = parse(parser, arguments)
    if options is None:
        return 0
    for name in ("input_len", "output_len", "batch_size", "num_iters"):
        if getattr(options, name) < 1:
            raise ConfigError("must be at least 1", "--" + name.replace("_", "-"))
    config = engine_config(options, enable_prefix_caching=False)
    with open_llm(config) as llm:
        latencies = _measure(llm, options)
    figures = summary(latencies)
    print(f"Avg latency: {figures['avg_latency']} seconds")
    print(f"Std latency: {figures['std_latency']} seconds")
    for percentile, value in figures["percentiles"].items():
        print(f"{percentile}% percentile latency: {value} seconds")
    decoded = options.batch_size * options.n * options.output_len
    print(f"median {figures['percentiles']['50']:.4f} s, {decoded / figures['percentiles']['50']:.1f} output tokens/s")
    if options.output_json:
        asked = {name: getattr(options, name) for name in ("input_len", "output_len", "batch_size", "n")}
        write_json(options.output_json, figures | asked | {"model": config.model.model} | machine())
        print(f"figures are in {options.output_json}")
    return 0


def summary(latencies_s: list[float]) -> dict[str, Any]:
    """vLLM's keys: mean, standard deviation, every measurement, percentiles. Seconds."""
    array = np.array(latencies_s)
    return {
        "avg_latency": float(array.mean()),
        "std_latency": float(array.std()),
        "latencies": latencies_s,
        "percentiles": {str(p): float(np.percentile(array, p)) for p in PERCENTILES},
    }


def _measure(llm: Any, options: Any) -> list[float]:
    """Seconds of each measured batch."""
    vocabulary, rng = Vocabulary.of(llm.tokenizer, llm.model_config.vocab_size), np.random.default_rng(0)
    prompts = [vocabulary.draw(rng, options.input_len) for _ in range(options.batch_size)]
    params = SamplingParams(
        n=options.n,
        temperature=options.temperature,
        ignore_eos=True,
        max_tokens=options.output_len,
        detokenize=not options.disable_detokenize,
    )
    latencies: list[float] = []
    shows = not options.disable_tqdm and sys.stdout.isatty()
    with Progress(disable=not shows, transient=True) as bar:
        for name, num in (("Warm-up", options.num_iters_warmup), ("Batches", options.num_iters)):
            latencies.clear()
            for _ in bar.track(range(num), description=name):
                begin = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                latencies.append(time.perf_counter() - begin)
    return latencies
