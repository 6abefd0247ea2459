"""`penstock quantize MODEL OUT --scheme int4`: a checkpoint with smaller weights, in a format that other engines read.

Knows the flags and where calibration text comes from. Rounding and files are known in `training` and `nn`.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

from penstock.commands.arguments import parse_or_help
from penstock.config.flags import FlagParser
from penstock.config.load import model_directory
from penstock.config.model import ModelConfigError, load_model_config
from penstock.config.values import ConfigError, format_bytes

SCHEMES = ("int8", "w8a8", "int4", "w4a8")
TEMPERATURE = 1.0  # of self-written calibration text


def main(arguments: list[str]) -> int:
    parser = FlagParser(prog="penstock quantize", description="Write a compressed-tensors checkpoint of a plain one.")
    parser.add_argument("source", metavar="MODEL", help="model directory or built-in model")
    parser.add_argument("out", metavar="OUT", help="directory to write; it must be new or empty")
    parser.add_argument(
        "--scheme", choices=SCHEMES, required=True, help="weights of 8 or 4 bits, activations bf16 or 8 bits"
    )
    parser.add_argument(
        "--method",
        choices=("auto", "rtn", "gptq"),
        default="auto",
        help="auto: gptq for 4 bits, round to nearest for 8",
    )
    parser.add_argument("--head", choices=("bf16", "8bit"), default="bf16", help="8bit: quantize lm_head too [bf16]")
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help='stays plain; also "re:PATTERN"')
    parser.add_argument(
        "--group-size", type=int, default=128, help="of 4 bits: a multiple of 128, -1: whole rows [128]"
    )
    parser.add_argument(
        "--no-rotation",
        dest="rotate",
        action="store_false",
        help="with 8-bit activations: write no transform_config, for engines that do not know it; loses more",
    )
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="FILE",
        help=".txt or .jsonl; builtin: the model writes it [builtin]",
    )
    parser.add_argument("--num-samples", type=int, default=128, help="pieces of calibration text [128]")
    parser.add_argument("--sample-tokens", type=int, default=512, help="tokens of each [512]")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration text [0]")
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    source = model_directory(parsed.source)
    method = parsed.method
    if method == "auto":
        method = "gptq" if parsed.scheme in ("int4", "w4a8") else "rtn"
    if min(parsed.num_samples, parsed.sample_tokens) < 1:
        raise ConfigError("--num-samples and --sample-tokens must be at least 1")

    def text() -> Any:
        return calibration_rows(
            source, parsed.calibration, num=parsed.num_samples, length=parsed.sample_tokens, seed=parsed.seed
        )

    quantize = importlib.import_module("penstock.training.quantize")
    recipe = quantize.Recipe(
        parsed.scheme,
        method,
        head=parsed.head,
        ignore=tuple(parsed.ignore),
        group_size=parsed.group_size,
        rotate=parsed.rotate,
    )
    done = quantize.quantize_checkpoint(source, parsed.out, recipe, text, _Teller())
    if done.eight_bits:
        print(
            f"{len(done.eight_bits)} modules got 8 bits: groups of {parsed.group_size} do not divide their width, "
            f"as in {done.eight_bits[0]}"
        )
    print(f"wrote {parsed.out}: {done.num_modules} modules in {parsed.scheme} ({method}), {format_bytes(done.bytes)}")
    print(f"next: penstock serve {parsed.out}")
    return 0


def calibration_rows(source: Path, text: str, *, num: int, length: int, seed: int) -> Any:
    """Calibration text, int64 [rows, tokens], no longer than what every layer sees at once. text: a file, or "builtin".

    Raises ConfigError, CheckpointError and TokenizerError.
    """
    try:
        model = load_model_config(source)
    except ModelConfigError as error:
        raise ConfigError(str(error)) from None
    calibration = importlib.import_module("penstock.training.calibration")
    windows = [window for window in model.layer_windows if window is not None]
    length = min(length, model.max_position, *windows)
    if length < 2:
        raise ConfigError("calibration needs samples of 2 tokens or more", "--sample-tokens")
    tokenizer = importlib.import_module("penstock.engine.tokenizer").load_tokenizer(source)
    if text != "builtin":
        return calibration.rows_of_file(Path(text), tokenizer, num, length, seed)
    begins = calibration.beginnings(tokenizer, model.vocab_size, num, seed)
    begins = [begin[: length - 1] for begin in begins]
    return calibration.rows_of(_written(source, begins, length, seed), length)


def _written(source: Path, begins: list[list[int]], length: int, seed: int) -> list[list[int]]:
    """What the model makes of the beginnings, `length` tokens each. It is served plain for this."""
    params = importlib.import_module("penstock.core.request").SamplingParams
    llm = importlib.import_module("penstock.llm").LLM(source, quantization="none", max_model_len=length)
    wanted = [
        params(
            temperature=TEMPERATURE, seed=seed + n, max_tokens=length - len(begin), ignore_eos=True, detokenize=False
        )
        for n, begin in enumerate(begins)
    ]
    with llm:
        outputs = llm.generate(begins, wanted, use_tqdm=sys.stderr.isatty())
    return [[*begin, *each.outputs[0].token_ids] for begin, each in zip(begins, outputs, strict=True)]


class _Teller:
    """Progress on standard error: one line that is overwritten on a terminal, one line a minute elsewhere."""

    def __init__(self) -> None:
        self._last_s = -60.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last_s >= 60:
            self._last_s = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
