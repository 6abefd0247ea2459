"""How fast do weights get from the page cache into a model's parameters, beside the safetensors library?

Writes a synthetic Llama checkpoint of about --megabytes to a temporary directory (in 2 shards), then loads it in turns:
`penstock` (load_weights, into fused parameters) and `safetensors` (load_file per shard, then copy_ of each tensor into
the same fused parameters). Parameters are allocated and touched before the clock starts (--fresh: inside the clock).
Each loaded model is compared bit by bit before its time counts. Prints one JSON line per method: median seconds and
10^9 bytes per second, and CPU seconds of all threads, which are steadier where other programs run. The page cache is
warm: it does not say what a cold disk does.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from penstock.config.model import parse_model_config
from penstock.nn.models import create_model, model_routes
from penstock.nn.weights.create import init_dummy
from penstock.nn.weights.stream import load_weights

HIDDEN, INTERMEDIATE, VOCAB = 2048, 5632, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk-mb", type=float, default=16)
    parser.add_argument("--stored", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--fresh", action="store_true", help="allocate the parameters inside the clock")
    args = parser.parse_args()
    stored, dtype = getattr(torch, args.stored), getattr(torch, args.dtype)
    layer_bytes = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE) * stored.itemsize
    num_layers = max(1, round((args.megabytes * 1e6 - VOCAB * HIDDEN * stored.itemsize) / layer_bytes))
    config = parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        }
    )
    routes = [route for route in model_routes(config) if route.kind == "fill"]
    seconds: dict[str, list[float]] = {"penstock": [], "safetensors": []}
    cpu_seconds: dict[str, list[float]] = {method: [] for method in seconds}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = create_model(config, stored)
        init_dummy(source, 0)
        num_bytes = _write(directory, source, routes)
        expected = {name: p.to(dtype) for name, p in source.named_parameters()}
        targets = {method: create_model(config, dtype) for method in seconds}
        for model in targets.values():
            _zero(model)

        for repeat in range(args.repeats + 1):  # the first round warms the page cache and does not count
            for method in seconds:
                model = targets[method]
                if not args.fresh:
                    _zero(model)
                begin, cpu_begin = time.perf_counter(), time.process_time()
                if args.fresh:
                    model = create_model(config, dtype)
                if method == "penstock":
                    load_weights(directory, model, routes, threads=args.threads, chunk_bytes=int(args.chunk_mb * 2**20))
                else:
                    _load_safetensors(directory, model, routes)
                elapsed, cpu_elapsed = time.perf_counter() - begin, time.process_time() - cpu_begin
                for key, parameter in model.named_parameters():
                    assert torch.equal(parameter, expected[key]), f"{method} loaded {key} wrongly"
                if repeat:
                    seconds[method].append(elapsed)
                    cpu_seconds[method].append(cpu_elapsed)
    for method, times in seconds.items():
        median = statistics.median(times)
        line = {
            "method": method,
            "bytes": num_bytes,
            "seconds_median": round(median, 4),
            "seconds_min": round(min(times), 4),
            "seconds_max": round(max(times), 4),
            "cpu_seconds_median": round(statistics.median(cpu_seconds[method]), 4),
            "gb_per_s": round(num_bytes / median / 1e9, 3),
            "stored": args.stored,
            "dtype": args.dtype,
            "fresh_memory": args.fresh,
            "threads": args.threads if method == "penstock" else 1,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} torch threads",
        }
        print(json.dumps(line))


def _write(directory: Path, model: torch.nn.Module, routes: list) -> int:
    """The model's parameters under their Hugging Face names, in two shards with an index. Returns the bytes of both."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {}
    for route in routes:
        whole = parameters[route.target]
        tensors[route.source] = whole if route.rows is None else whole[route.rows[0] : route.rows[1]].clone()
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in part}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _load_safetensors(directory: Path, model: torch.nn.Module, routes: list) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {route.source: route for route in routes}
    with torch.no_grad():
        for path in sorted(directory.glob("*.safetensors")):
            for name, tensor in safetensors.torch.load_file(path).items():
                whole, rows = parameters[places[name].target], places[name].rows
                (whole if rows is None else whole[rows[0] : rows[1]]).copy_(tensor)


def _zero(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


if __name__ == "__main__":
    main()
