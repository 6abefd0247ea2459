"""Draws the result of run.py: for every work and group, how fast each peer is beside penstock's fastest engine.

    .venv/bin/python benchmarks/peers/plot.py benchmarks/results/peers.json peers.svg

Needs the extra `bench` (matplotlib). Knows the result file only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OURS = "penstock"
PEERS = ("transformers", "vllm", "openvino", "llamacpp")


def speed(entry: dict[str, Any], peer: str) -> float | None:
    """Of the peer's fastest engine; only to be compared within `entry`."""
    found = [
        figures["decode_tokens_per_s"] if entry["figure"] == "decode" else 1 / figures["median_s"]
        for name, figures in entry["engines"].items()
        if name.startswith((peer + ":", peer + "/"))
    ]
    return max(found, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(args.result.read_text(encoding="utf-8"))
    rows = [entry for entry in result["works"] if speed(entry, OURS)]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.55 * len(rows)), layout="constrained")
    height = 0.8 / len(PEERS)
    for n, peer in enumerate(PEERS):
        shares = [(speed(entry, peer) or 0.0) / (speed(entry, OURS) or 1.0) for entry in rows]
        axes.barh([at + n * height for at in range(len(rows))], shares, height, label=peer)
    axes.axvline(1.0, color="black", linewidth=1.2, label=OURS)
    axes.set_yticks(
        [at + 0.4 - height / 2 for at in range(len(rows))],
        [f"{entry['title']}\n{entry['group']}" for entry in rows],
        fontsize=8,
    )
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("speed, penstock = 1 (more is faster)")
    axes.set_title(f"{result['machine']}, {result['threads']} threads, commit {result['commit']}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(PEERS) + 1, fontsize=8)
    figure.savefig(args.picture)


if __name__ == "__main__":
    main()
