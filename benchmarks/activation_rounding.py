"""Which inputs of a model's projections lose what when they are rounded to 8 bits with a scale per token?

Rounds one kind of input at a time (all layers) in plain torch, float32, beside the exact model: weights stay as they
are. For each: how much larger its largest element is than its root mean square, how far apart the distributions are
and how often the best tokens agree, as benchmarks/quantization_quality.py measures them on the same text. The input of
the down projection comes again after a rotation, in blocks of 16 to 128, as native `w8a8` and `w4a8` do it. Prints one
JSON line per case; --out writes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantization_quality import compare, passages, rotated, rounded
from torch import Tensor, nn

from penstock.bench.flags import machine, write_json
from penstock.config.load import model_directory
from penstock.config.model import load_model_config
from penstock.config.quantization import ROTATIONS
from penstock.nn.doors import Batch
from penstock.nn.layers.linear import Linear
from penstock.nn.models import create_model, model_routes
from penstock.nn.weights.stream import load_weights
from penstock.training.dense import attention_for

KINDS = {
    "attention.qkv": "q, k, v",
    "attention.out": "o",
    "mlp.gate_up": "gate, up",
    "mlp.down": "down",
    "head": "head",
}
Change = Callable[[Tensor], Tensor]


class Exact:
    """The model in float32, its inputs changed by `changes`: kind -> function. `scores` as in quantization_quality."""

    def __init__(self, model: nn.Module, changes: dict[str, Change]) -> None:
        self.model, self.changes = model, changes
        self.ratios: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}

    def _before(self, kind: str, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0]
        self.ratios[kind].append(x.abs().amax(-1) / x.square().mean(-1).sqrt())
        return (self.changes[kind](x),) if kind in self.changes else (x,)

    @torch.inference_mode()
    def scores(self, ids: list[int]) -> Tensor:
        hooks = []
        for name, module in self.model.named_modules():
            kind = next((kind for kind in KINDS if name.endswith(kind)), None)
            if kind is not None and isinstance(module, Linear):
                hooks.append(module.register_forward_pre_hook(partial(self._before, kind)))
        attention = attention_for(1, len(ids), torch.device("cpu"))
        batch: Any = Batch(torch.tensor(ids), torch.arange(len(ids)), attention)
        found: Tensor = self.model.logits(self.model(batch)).float()
        for hook in hooks:
            hook.remove()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="penstock-tiny")
    parser.add_argument("--num-passages", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    directory = model_directory(args.model)
    config = load_model_config(directory)
    model = create_model(config, torch.float32)
    load_weights(directory, model, model_routes(config))
    texts = passages(args.model, directory, None, args.num_passages)
    reference = Exact(model, {})
    cases: list[tuple[str, dict[str, Change]]] = [(name, {kind: rounded}) for kind, name in KINDS.items()]
    blocks = [block for block in ROTATIONS if config.intermediate_size % block == 0]
    cases += [(f"down, rotated in blocks of {block}", {"mlp.down": partial(rotated, block)}) for block in blocks]
    every: dict[str, Change] = dict.fromkeys(KINDS, rounded)
    cases.append(("all", every))
    if blocks:
        cases.append(("all, down rotated", every | {"mlp.down": partial(rotated, blocks[-1])}))
    lines: list[dict[str, Any]] = []
    for name, changes in cases:
        figures = compare(reference, Exact(model, changes), texts)
        line: dict[str, Any] = {"model": directory.name, "rounded": name}
        if len(changes) == 1 and "rotated" not in name:
            ratio = torch.cat(reference.ratios[next(iter(changes))])
            line |= {"largest_over_rms_mean": round(float(ratio.mean()), 1), "most": round(float(ratio.max()), 1)}
        lines.append(line | figures)
        print(json.dumps(lines[-1]), flush=True)
    if args.out:
        write_json(args.out, {**machine(), "lines": lines})


if __name__ == "__main__":
    main()
