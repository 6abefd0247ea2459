"""`penstock doctor pd`: do the links that carry KV between engines work here, and how fast? One line each.

Exit code 0 when the link that `--kv-link auto` takes works, and each one that was asked for.
"""

from __future__ import annotations

from penstock.build.links import LinkFault, measure
from penstock.cluster.seat import chosen_link
from penstock.commands.arguments import parse_or_help
from penstock.config.complete import complete
from penstock.config.flags import FlagParser
from penstock.config.hardware import probe
from penstock.config.load import BUILT_IN_MODELS, resolve

LINKS = ("local", "shm", "tcp", "nixl", "mooncake")


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock doctor pd",
        description="Try the links that carry KV between prefill and decode engines: one big transfer over each.",
    )
    parser.add_argument("model", nargs="?", default=BUILT_IN_MODELS[0], help="model whose KV is sent [penstock-tiny]")
    parser.add_argument("--link", action="append", choices=LINKS, help="only this one; may be given again [all]")
    parser.add_argument("--megabytes", type=int, default=256, metavar="N", help="size of the transfer [256]")
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    resolved = complete(resolve({"model": parsed.model}), probe())
    layout, chosen = resolved.layout, chosen_link("auto")
    needed = set(parsed.link or [chosen])
    num_bad = 0
    for link in parsed.link or LINKS:
        try:
            figures = measure(link, layout, max(1, parsed.megabytes) << 20)
        except LinkFault as fault:
            num_bad += link in needed
            print(f"{'bad' if link in needed else 'note':<5} {link:<8} does not work: {fault}", flush=True)
            continue
        where = "within a process" if link == "local" else "between two processes"
        speed = f"{figures.bytes_per_s / 1e9:6.2f} GB/s {where} ({figures.num_bytes >> 20} MiB, checked)"
        message = f"{figures.message_s * 1e6:.0f} us per message"
        follows = f"layer by layer from {figures.layerwise_from(layout):,} tokens on"
        print(f"ok    {link:<8} {speed}, {message}: {follows}", flush=True)
    print(f"--kv-link auto takes {chosen}: engines that `penstock serve --pd` starts are on one machine")
    print("all in order" if not num_bad else f"{num_bad} to fix" if num_bad > 1 else "one thing to fix")
    return 1 if num_bad else 0
