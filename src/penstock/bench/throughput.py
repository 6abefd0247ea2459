"""`penstock bench throughput`: many prompts at once, offline, in this process: requests and tokens per second.

vLLM's flags, printed line and JSON keys. The bare command runs 256 prompts of 64 tokens for 32 tokens each, seconds
on a laptop. Knows flags and counts; `penstock.llm` does the work.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

from penstock.bench.dataset_flags import add_dataset, dataset
from penstock.bench.datasets import BenchRequest, Vocabulary
from penstock.bench.flags import ENGINE_SECTIONS, add_model, engine_config, machine, open_llm, parse, write_json
from penstock.config.flags import FlagParser
from penstock.config.values import ConfigError
from penstock.core.request import SamplingParams


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock bench throughput",
        description="Many prompts at once, offline: requests and tokens per second.",
        sections=ENGINE_SECTIONS,
        conflict_handler="resolve",  # --seed is the prompts' here, as in vLLM
    )
    add_model(parser)
    add_dataset(parser, num_prompts=256, input_len=64, output_len=32)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="outputs per prompt [1]")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest token [1]")
    parser.add_argument("--num-warmups", type=int, default=8, metavar="N", help="prompts before the clock starts [8]")
    parser.add_argument("--disable-detokenize", action="store_true", help="token ids only, no text")
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    parser.add_argument("--output-json", metavar="FILE", help="write the figures as JSON")
    options = parse(parser, arguments)
    if options is None:
        return 0
    if options.num_prompts < 1:
        raise ConfigError("must be at least 1", "--num-prompts")
    config = engine_config(options)
    with open_llm(config) as llm:
        figures = measure(llm, options)
    print(
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {figures['total_prompt_tokens']}")
    print(f"Total num output tokens:  {figures['total_output_tokens']}")
    if options.output_json:
        write_json(options.output_json, figures)
        print(f"figures are in {options.output_json}")
    return 0


def measure(llm: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Run the prompts; vLLM's JSON keys, and what the figures depend on."""
    vocabulary = Vocabulary.of(llm.tokenizer, llm.model_config.vocab_size)
    requests = dataset(options, llm.tokenizer, vocabulary)
    rng = np.random.default_rng((options.seed, 1))
    # Prompts of their own: the measured ones must not be in the prefix cache. As long, so that every shape is seen.
    warm = [
        BenchRequest(min(request.num_output, 8), request.num_prompt, vocabulary.draw(rng, max(request.num_prompt, 1)))
        for request in requests[: options.num_warmups]
    ]
    if warm:
        _generate(llm, warm, options, progress=False)
    progress = not options.disable_tqdm and sys.stdout.isatty()
    begin = time.perf_counter()
    outputs = _generate(llm, requests, options, progress=progress)
    elapsed_s = time.perf_counter() - begin
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return {
        "elapsed_time": elapsed_s,
        "num_requests": len(requests),
        "total_num_tokens": num_prompt + num_output,
        "total_prompt_tokens": num_prompt,
        "total_output_tokens": num_output,
        "requests_per_second": len(requests) / elapsed_s,
        "tokens_per_second": (num_prompt + num_output) / elapsed_s,
        "output_tokens_per_second": num_output / elapsed_s,
        "num_cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "model": llm.config.model.model,
        "dtype": llm.config.model.dtype,
        "num_threads": llm.config.runtime.num_threads,
        **machine(),
    }


def _generate(llm: Any, requests: list[BenchRequest], options: argparse.Namespace, *, progress: bool) -> list[Any]:
    prompts = [request.text if request.token_ids is None else request.token_ids for request in requests]
    params = [
        SamplingParams(
            n=options.n,
            temperature=options.temperature,
            ignore_eos=True,
            max_tokens=request.num_output,
            detokenize=not options.disable_detokenize,
        )
        for request in requests
    ]
    return llm.generate(prompts, params, use_tqdm=progress)  # type: ignore[no-any-return]
