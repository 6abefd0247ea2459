"""`penstock plan`: the memory table of a model on this machine, or on one with other free memory. Loads nothing.

Imports no torch: it answers at once, also where the model would not fit.
"""

from __future__ import annotations

import json
from dataclasses import replace

from penstock.commands.arguments import add_model, config_from, parse_or_help
from penstock.config.complete import complete
from penstock.config.flags import FlagParser
from penstock.config.hardware import probe
from penstock.config.values import ConfigError, parse_size


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock plan",
        description="Show how a model would use memory, before anything is loaded.",
        sections=("model", "cache", "scheduler"),
    )
    add_model(parser)
    parser.add_argument("--free", metavar="SIZE", help="plan for this much free memory instead of what is free now")
    parser.add_argument("--json", action="store_true", help="print JSON with byte counts")
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    config = config_from(parsed)
    machine = probe()
    if parsed.free is not None:
        try:
            machine = replace(machine, memory_free_bytes=parse_size(parsed.free), memory_note="--free")
        except ValueError:
            raise ConfigError(f"{parsed.free!r} is not a size such as 512M or 4GiB", "--free") from None
    resolved = complete(config, machine)
    memory = resolved.memory
    if parsed.json:
        fields = {
            "model": config.model.model,
            "dtype": resolved.config.model.dtype,
            "kv_cache_dtype": resolved.config.cache.kv_cache_dtype,
            "num_parameters": resolved.model.num_parameters,
            "block_size": resolved.layout.block_size,
            "num_blocks": list(memory.num_blocks),
            "max_model_len": memory.max_model_len,
            "weights_bytes": memory.weights_bytes,
            "activation_bytes": memory.activation_bytes,
            "runtime_bytes": memory.runtime_bytes,
            "kv_bytes": memory.kv_bytes,
            "free_bytes": memory.free_bytes,
            "max_full_requests": round(memory.max_full_requests, 2),
        }
        print(json.dumps(fields))
        return 0
    print(f"{config.model.model} ({resolved.model.architecture}) on {machine.words}")
    print(memory.table())
    return 0
