"""`penstock convert llama2c MODEL.bin --tokenizer TOK.bin OUT_DIR`: other formats into model directories.

Knows the flags. The formats themselves are known in nn.weights.
"""

from __future__ import annotations

import importlib

from penstock.commands.arguments import parse_or_help
from penstock.config.flags import FlagParser
from penstock.config.values import ConfigError, format_bytes, suggestion


def main(arguments: list[str]) -> int:
    formats = ("llama2c",)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: penstock convert llama2c MODEL.bin --tokenizer TOK.bin OUT_DIR\n")
        print("  llama2c      llama2.c checkpoints and tokenizers (version 0 of the format)")
        return 0 if arguments else 2
    if arguments[0] not in formats:
        raise ConfigError(f"penstock convert has no {arguments[0]!r}{suggestion(arguments[0], formats)}")
    parser = FlagParser(prog="penstock convert llama2c", description="Turn a llama2.c checkpoint into a directory.")
    parser.add_argument("model_path", metavar="MODEL.bin", help="the checkpoint")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="directory to write; it must be new or empty")
    parser.add_argument("--tokenizer", metavar="TOK.bin", required=True, help="its tokenizer")
    parsed = parse_or_help(parser, arguments[1:])
    if parsed is None:
        return 0
    convert = importlib.import_module("penstock.nn.weights.llama2c").convert_llama2c
    done = convert(parsed.model_path, parsed.tokenizer, parsed.out_dir)
    print(f"wrote {parsed.out_dir}: {done.num_parameters:,} parameters, {format_bytes(done.bytes)}")
    print(f"next: penstock serve {parsed.out_dir}")
    return 0
