"""What do weights and a KV cache of fewer bits cost in quality, beside bf16 with the same kernels?

Measures `--quantization` on load, and checkpoints: those given with --checkpoint DIR, and with --gptq those that
`penstock quantize` makes with calibration, whose text begins otherwise and has other seeds than what is predicted here.
Teacher-forced on text that the model itself wrote (sampled at temperature 0.8 from many beginnings; --text FILE takes
other text, one passage per line): at every position, do the best tokens agree, how far apart are the distributions
(mean KL in nats), and how much worse is the text predicted. A flat model's best token changes with the last bit of
anything: agreement is told once more without the close positions, those where the reference's two best tokens have
probabilities within 10 % of one another. --kernels torch is for models that native kernels cannot compute: for the KV
cache, and for checkpoints, whose weights it dequantizes and whose inputs it rounds where the scheme does. Prints one
JSON line per scheme; --out writes them.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penstock.bench.flags import machine, write_json
from penstock.build.engine import QUANTIZATION
from penstock.commands.quantize import calibration_rows
from penstock.config.load import model_directory
from penstock.config.model import DTYPE_BYTES, kv_layout, load_model_config
from penstock.config.quantization import CheckpointQuantization
from penstock.core.request import SamplingParams
from penstock.engine.tokenizer import load_tokenizer
from penstock.llm import LLM
from penstock.nn.doors import AttentionBackend, Batch, Spans
from penstock.nn.kernels.attention import PagedAttention
from penstock.nn.kernels.native import NativeAttention, NativeModel, PackedWeights, packed_layout, usable_kernels
from penstock.nn.layers.linear import Linear
from penstock.nn.models import create_model, model_routes
from penstock.nn.quant.rotation import rotate
from penstock.nn.weights.routes import Route
from penstock.nn.weights.stream import load_weights
from penstock.runner.kv_store import KVStore
from penstock.runner.runner import Model
from penstock.training.quantize import Recipe, quantize_checkpoint

BLOCK = 32
MAX_TOKENS = 512
CLEAR_NATS = math.log(1.1)
# (weights, KV cache): each alone, and both in 8 bits.
SCHEMES = [(name, "bfloat16") for name in QUANTIZATION if name != "none"] + [("none", "int8"), ("w8a8", "int8")]
BEGINNINGS = (
    "Once upon a time",
    "The little dog",
    "One day, a girl named",
    "Hello! Who are",
    "In the garden",
    "My name is",
)


def rounded(x: Tensor) -> Tensor:
    """To 8 bits with a scale per token, and back."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(x / scale) * scale


def rotated(block: int, x: Tensor) -> Tensor:
    """The same, but rotated meanwhile."""
    return rotate(rounded(rotate(x, block)), block)


def round_inputs(model: nn.Module, routes: Sequence[Route], quantization: CheckpointQuantization) -> None:
    """From now on `model` rounds the inputs of projections that a checkpoint quantizes with 8-bit activations."""
    targets = {}
    for route in routes:
        scheme = quantization.scheme_of(route.source.removesuffix(".weight"))
        if scheme is not None and scheme.activations:
            known = targets.setdefault(route.target.removesuffix(".weight"), scheme)
            assert known == scheme, f"{route.target}: parts of it are quantized differently"
    for target, scheme in targets.items():
        module = model.get_submodule(target)
        if isinstance(module, Linear):
            change = partial(rotated, scheme.rotation) if scheme.rotation else rounded
            module.register_forward_pre_hook(lambda _, inputs, change=change: (change(inputs[0]), *inputs[1:]))


class Forced:
    """A model in one scheme, quantized while it loads or before; `scores(ids)`: float32 [len(ids), vocab] after every
    token. With kernels "torch": in the checkpoint's dtype.
    """

    def __init__(self, directory: Path, scheme: str, kv_dtype: str, kernels: str) -> None:
        config = load_model_config(directory)
        plain = kernels == "torch"
        model = create_model(config, getattr(torch, config.dtype) if plain else torch.bfloat16)
        weights = None if plain else PackedWeights(model, 2, QUANTIZATION[scheme])
        load_weights(directory, model, model_routes(config), packer=weights, quantization=config.quantization)
        layout = kv_layout(config, BLOCK, kv_dtype)
        layout = layout if plain else packed_layout(layout)
        num_blocks = 1 + MAX_TOKENS // BLOCK
        store = KVStore(layout, (num_blocks,) * len(layout.groups), torch.device("cpu"))
        self.num_groups = len(layout.groups)
        self.model: Model = model
        self.attention: AttentionBackend = PagedAttention(layout, store.pools, getattr(torch, config.dtype))
        self.weight_mb = config.num_parameters * DTYPE_BYTES[config.dtype] / 1e6
        if plain and config.quantization is not None:
            self.weight_mb = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6
            round_inputs(model, model_routes(config), config.quantization)
        if weights is not None:
            self.model = NativeModel(model, weights, layout, store.pools, kernels=kernels, max_tokens=MAX_TOKENS)
            self.attention = NativeAttention()
            self.weight_mb = weights.num_bytes / 1e6

    @torch.inference_mode()
    def scores(self, ids: list[int]) -> torch.Tensor:
        table = np.arange(1, 2 + len(ids) // BLOCK, dtype=np.int32)[None]
        spans = Spans(np.array([0, len(ids)]), np.array([0]), (table,) * self.num_groups)
        tokens, positions = torch.tensor(ids), torch.arange(len(ids))
        return self.model.logits(self.model(Batch(tokens, positions, self.attention.prepare(spans)))).float()


def passages(model: str, directory: Path, text: Path | None, num: int) -> list[list[int]]:
    if text is not None:
        tokenizer = load_tokenizer(directory)
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [tokenizer.encode(line)[:MAX_TOKENS] for line in lines[:num]]
    with LLM(model, max_model_len=MAX_TOKENS) as llm:
        params = [SamplingParams(temperature=0.8, seed=n, max_tokens=300, ignore_eos=True) for n in range(num)]
        beginnings = [BEGINNINGS[n % len(BEGINNINGS)] for n in range(num)]
        outputs = llm.generate(beginnings, params)
    return [[*each.prompt_token_ids, *each.outputs[0].token_ids] for each in outputs]


def made_checkpoints(model: str, folder: Path) -> list[tuple[str, str, Path]]:
    """(scheme, how, directory) of calibrated checkpoints, made now."""
    source, found = model_directory(model), []
    rows = calibration_rows(source, "builtin", num=128, length=512, seed=0)
    for scheme, head in (("int8", "8bit"), ("w8a8", "8bit"), ("int4", "8bit"), ("w4a8", "8bit"), ("int4", "bf16")):
        directory = folder / f"{scheme}-{head}"
        quantize_checkpoint(source, directory, Recipe(scheme, "gptq", head=head), lambda: rows)
        found.append((scheme, f"penstock quantize --method gptq --head {head}", directory))
    return found


def compare(reference: Forced, other: Forced, texts: list[list[int]]) -> dict[str, float]:
    agree = num = num_clear = agree_clear = 0
    kl = loss = loss_reference = 0.0
    for ids in texts:
        exact, found = reference.scores(ids).log_softmax(-1)[:-1], other.scores(ids).log_softmax(-1)[:-1]
        following = torch.tensor(ids[1:])[:, None]
        same = exact.argmax(-1) == found.argmax(-1)
        best = exact.topk(2).values
        clear = best[:, 0] - best[:, 1] > CLEAR_NATS
        agree, agree_clear = agree + int(same.sum()), agree_clear + int(same[clear].sum())
        kl += float((exact.exp() * (exact - found)).sum())
        loss_reference -= float(exact.gather(1, following).sum())
        loss -= float(found.gather(1, following).sum())
        num, num_clear = num + len(ids) - 1, num_clear + int(clear.sum())
    growth = math.exp((loss - loss_reference) / num) - 1
    return {
        "top1_agreement_percent": round(100 * agree / num, 2),
        "close_positions_percent": round(100 - 100 * num_clear / num, 2),
        "top1_agreement_elsewhere_percent": round(100 * agree_clear / num_clear, 2),
        "mean_kl_nats": round(kl / num, 5),
        "perplexity": round(math.exp(loss / num), 3),
        "perplexity_growth_percent": round(100 * growth, 2),
        "num_positions": num,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="penstock-tiny")
    parser.add_argument("--text", type=Path, help="passages to predict, one per line")
    parser.add_argument("--num-passages", type=int, default=64)
    parser.add_argument("--kernels", default=usable_kernels()[0], choices=[*usable_kernels(), "torch"])
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="quantized directory of --model")
    parser.add_argument("--gptq", action="store_true", help="make and measure calibrated checkpoints (minutes)")
    parser.add_argument("--add", action="store_true", help="keep the lines that --out holds already")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    directory = model_directory(args.model)
    texts = passages(args.model, directory, args.text, args.num_passages)
    reference = Forced(directory, "none", "bfloat16", args.kernels)
    with tempfile.TemporaryDirectory() as folder:
        measured = [(scheme, kv_dtype, "--quantization", directory) for scheme, kv_dtype in SCHEMES]
        made = made_checkpoints(args.model, Path(folder)) if args.gptq else []
        made += [("stored", path.name, path) for path in args.checkpoint]
        measured += [(scheme, "bfloat16", how, path) for scheme, how, path in made]
        lines: list[dict[str, Any]] = json.loads(args.out.read_text())["lines"] if args.add else []
        for scheme, kv_dtype, how, path in measured:
            if args.kernels == "torch" and path == directory and scheme != "none":
                continue
            other = Forced(path, scheme if path == directory else "none", kv_dtype, args.kernels)
            facts = {"model": directory.name, "scheme": scheme, "kv_cache_dtype": kv_dtype, "how": how}
            text = "its own" if args.text is None else args.text.name
            figures = {"weight_mb": round(other.weight_mb, 1), **compare(reference, other, texts)}
            lines.append({**facts, **figures, "text": text, "kernels": args.kernels})
            print(json.dumps(lines[-1]), flush=True)
    if args.out:
        write_json(args.out, {**machine(), "lines": lines})


if __name__ == "__main__":
    main()
