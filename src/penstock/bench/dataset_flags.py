"""The flags that choose prompts, and the requests they stand for: shared by `bench serve` and `bench throughput`.

Names and defaults are vLLM's, but that a hash id stands for 512 tokens, as in Mooncake's own traces (vLLM's 16 would
cut their prompts to a 32nd). Knows flags; the requests are made in `datasets`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from penstock.bench.datasets import (
    MOONCAKE_BLOCK,
    BenchRequest,
    Vocabulary,
    custom_requests,
    prefix_repetition_requests,
    random_requests,
    sharegpt_requests,
    timed_trace_requests,
)
from penstock.config.flags import FlagParser
from penstock.config.values import ConfigError
from penstock.engine.tokenizer import Tokenizer

DATASETS = ("random", "prefix_repetition", "sharegpt", "timed_trace", "custom")


def add_dataset(parser: FlagParser, *, num_prompts: int, **defaults: Any) -> None:
    """Flags that choose prompts; shared with `bench throughput`. `defaults`: other lengths for the random dataset."""
    add = parser.add_argument
    random_len, output_len = defaults.get("input_len", 1024), defaults.get("output_len", 128)
    add("--dataset-name", default="random", choices=DATASETS, help="where prompts come from [random]")
    add("--dataset-path", metavar="FILE", help="file of sharegpt, timed_trace or custom; traces may be .gz")
    add("--num-prompts", type=int, default=num_prompts, metavar="N", help=f"requests [{num_prompts}]")
    add("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals [0]")
    add("--input-len", type=int, metavar="N", help="as --random-input-len")
    add("--output-len", type=int, metavar="N", help="output tokens, whatever the dataset")
    add("--random-input-len", type=int, default=random_len, metavar="N", help=f"prompt tokens [{random_len}]")
    add("--random-output-len", type=int, default=output_len, metavar="N", help=f"output tokens [{output_len}]")
    add("--random-prefix-len", type=int, default=0, metavar="N", help="tokens in front that all prompts share [0]")
    add("--random-range-ratio", type=float, default=0.0, metavar="X", help="lengths vary by this share, both ways [0]")
    add("--prefix-repetition-prefix-len", type=int, default=256, metavar="N", help="shared tokens [256]")
    add("--prefix-repetition-suffix-len", type=int, default=256, metavar="N", help="own tokens [256]")
    add("--prefix-repetition-num-prefixes", type=int, default=10, metavar="N", help="different beginnings [10]")
    add("--prefix-repetition-output-len", type=int, default=128, metavar="N", help="output tokens [128]")
    add("--sharegpt-output-len", type=int, metavar="N", help="output tokens [those of the answer in the file]")
    add("--custom-output-len", type=int, default=256, metavar="N", help="output tokens; -1: the line's own [256]")
    add("--timed-trace-chunk-hash-size", type=int, default=MOONCAKE_BLOCK, metavar="N", help="tokens per hash id [512]")
    add("--timed-trace-sec-multiplier", type=float, default=0.001, metavar="X", help="seconds per time unit [0.001]")
    add("--timed-trace-length-scale", type=float, default=1.0, metavar="X", help="shrink prompts and outputs to X [1]")
    add("--timed-trace-speed", type=float, default=1.0, metavar="X", help="play the trace X times as fast [1]")
    add("--disable-shuffle", action="store_true", help="lines of a custom file in their order")
    add("--no-oversample", action="store_true", help="a small file gives fewer requests instead of repeating them")


def dataset(options: argparse.Namespace, tokenizer: Tokenizer | None, made_up: Vocabulary) -> list[BenchRequest]:
    """The requests that the flags ask for; made-up prompts are of `made_up`. Raises ConfigError."""
    name, num, path = options.dataset_name, options.num_prompts, options.dataset_path
    rng = np.random.default_rng(options.seed)
    if name in ("random", "prefix_repetition"):
        if path is not None:
            raise ConfigError(f"{name} reads no file; name the dataset of your file", "--dataset-path")
    elif path is None:
        raise ConfigError(f"{name} needs a file", "--dataset-path")

    def length(own: str) -> Any:
        return getattr(options, own) if options.output_len is None else options.output_len

    if name == "random":
        return random_requests(
            made_up, num, rng,
            input_len=options.random_input_len if options.input_len is None else options.input_len,
            output_len=length("random_output_len"),
            prefix_len=options.random_prefix_len,
            range_ratio=options.random_range_ratio,
        )  # fmt: skip
    if name == "prefix_repetition":
        return prefix_repetition_requests(
            made_up, num, rng,
            prefix_len=options.prefix_repetition_prefix_len,
            suffix_len=options.prefix_repetition_suffix_len,
            num_prefixes=options.prefix_repetition_num_prefixes,
            output_len=length("prefix_repetition_output_len"),
        )  # fmt: skip
    if name == "timed_trace":
        return timed_trace_requests(
            path, made_up, num, options.seed,
            block_size=options.timed_trace_chunk_hash_size,
            length_scale=options.timed_trace_length_scale,
            seconds_per_unit=options.timed_trace_sec_multiplier,
            speed=options.timed_trace_speed,
        )  # fmt: skip
    oversample = not options.no_oversample
    if name == "custom":
        shuffle = not options.disable_shuffle
        output_len = length("custom_output_len")
        return custom_requests(path, tokenizer, num, rng, output_len=output_len, oversample=oversample, shuffle=shuffle)
    if tokenizer is None:
        raise ConfigError("sharegpt needs a tokenizer, for lengths", "--tokenizer")
    return sharegpt_requests(path, tokenizer, num, rng, output_len=length("sharegpt_output_len"), oversample=oversample)
