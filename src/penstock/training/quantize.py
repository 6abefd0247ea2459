"""`penstock quantize`: a plain checkpoint to a compressed-tensors one, layer by layer, with or without calibration.

Holds one layer at a time (and, calibrating, the hidden states of its text); what is written appears complete or not at
all. Knows checkpoints, layers and rounding; the engine that serves the result knows nothing of this file.
Exactness: without calibration, and rotated, E0 to `--quantization` on load, both refusing weights that are not finite;
what either loses beside bf16 is E3, measured by benchmarks/quantization_quality.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from penstock.config.model import ModelConfig, Projection, load_model_config
from penstock.config.quantization import NATIVE_GROUP, WeightScheme, describe
from penstock.nn.models import create_model, model_routes
from penstock.nn.quant.gptq import gptq
from penstock.nn.quant.rotation import largest_rotation, rotate
from penstock.nn.quant.rounding import Grid, Rounded, pack_words, round_to_nearest
from penstock.nn.weights.errors import CheckpointError
from penstock.nn.weights.headers import StoredTensor, read_checkpoint
from penstock.nn.weights.layout import FLOAT_DTYPES, match
from penstock.nn.weights.routes import Route
from penstock.nn.weights.shards import SHARD_BYTES, Planned, ShardWriter
from penstock.training.layerwise import CalibratedLayers

HEAD, TABLE = "lm_head", "model.embed_tokens.weight"
# Beside config.json: what a server or a tokenizer reads, and the terms.
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
Tell = Callable[[str, int, int], None]


class QuantizeError(CheckpointError):
    """This checkpoint cannot be quantized as asked. The text says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to do. scheme: "int8", "w8a8", "int4", "w4a8". head: "bf16" leaves it as it is, "8bit" does not.

    ignore: names or "re:" patterns of modules that stay plain. group_size: columns that share a scale in 4 bits, a
    multiple of 128, or -1 for whole rows. Matrices whose width is not a multiple of it get 8 bits. rotate: where inputs
    get 8 bits, those with outliers are rotated before, as on load; needs an engine that knows `transform_config`.
    """

    scheme: str
    method: str = "rtn"  # or "gptq", which needs calibration rows
    head: str = "bf16"
    ignore: tuple[str, ...] = ()
    group_size: int = NATIVE_GROUP
    rotate: bool = True
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Report:
    """What was written. `eight_bits`: modules whose width is not whole groups; `errors`: of calibrated matrices."""

    directory: Path
    bytes: int
    num_modules: int
    eight_bits: tuple[str, ...]
    errors: dict[str, float]  # relative, of each calibrated matrix's outputs on the calibration text


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    text: Callable[[], Tensor] | None = None,
    tell: Tell | None = None,
) -> Report:
    """Write `out` from the checkpoint in `source`. text: makes calibration text for gptq, int64 [rows, tokens].

    `tell(what, done, total)`. Raises ModelConfigError and CheckpointError; `out` must be absent or empty.
    """
    source, out = Path(source), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizeError(f"{out} exists and is not an empty directory")
    work = _Work(source, recipe)
    rows = None
    if recipe.method == "gptq":
        if text is None:
            raise QuantizeError("gptq needs calibration text")
        rows = text()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with torch.inference_mode(), ShardWriter(partial, work.plan(), recipe.shard_bytes) as writer:
            work.write(writer, rows, tell or _silent)
            num_bytes = writer.finish()
        for path in sorted(source.iterdir()):
            wanted = path.suffix in COPIED and not path.name.endswith(".index.json") and path.name != "config.json"
            if path.is_file() and (wanted or path.name.upper().startswith(("LICENSE", "NOTICE"))):
                shutil.copyfile(path, partial / path.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = describe(*work.groups())
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, out)  # an empty directory may be replaced
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Report(out, num_bytes, len(work.schemes), tuple(work.eight_bits), work.errors)


def _silent(what: str, done: int, total: int) -> None:
    pass


class _Work:
    """One checkpoint being quantized."""

    def __init__(self, source: Path, recipe: Recipe) -> None:
        self.config: ModelConfig = load_model_config(source)
        if self.config.quantization is not None:
            raise QuantizeError(f"{source} is quantized already")
        if recipe.group_size != -1 and (recipe.group_size < 1 or recipe.group_size % NATIVE_GROUP):
            raise QuantizeError(f"--group-size must be a multiple of {NATIVE_GROUP}, or -1 for whole rows")
        for pattern in recipe.ignore:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except re.error as error:
                raise QuantizeError(f"--ignore {pattern}: not a pattern: {error}") from None
        self.recipe = recipe
        checkpoint = read_checkpoint(source)
        self.routes = model_routes(self.config)
        match(checkpoint, create_model(self.config, torch.bfloat16, "meta"), self.routes)
        self.homes = {tensor.name: (shard.path, tensor) for shard in checkpoint.shards for tensor in shard.tensors}
        self.eight_bits: list[str] = []
        self.errors: dict[str, float] = {}
        self.schemes = dict(self._choose())  # module -> scheme
        if not self.schemes:
            raise QuantizeError("nothing is left to quantize: every projection is ignored")

    def _choose(self) -> Iterator[tuple[str, WeightScheme]]:
        used: set[str] = set()
        for layer in range(self.config.num_layers):
            for projection in self.config.projections:
                names = [f"model.layers.{layer}.{name}" for name in projection.names]
                kept = [name for name in names if self._ignored(name, used)]
                if kept and len(kept) < len(names):
                    raise QuantizeError(f"--ignore {kept[0]}: {', '.join(names)} are one matrix; ignore all or none")
                if not kept:
                    for name in names:
                        yield name, self._scheme(name, projection)
        if not self._ignored(HEAD, used) and self.recipe.head != "bf16":
            activations = self.recipe.scheme.endswith("a8")
            yield HEAD, WeightScheme(8, None, activations, packed=not activations)
        unused = [pattern for pattern in self.recipe.ignore if pattern not in used and pattern != HEAD]
        if unused:
            raise QuantizeError(f"--ignore {unused[0]}: no module of this model matches")

    def _ignored(self, name: str, used: set[str]) -> bool:
        hits = {p for p in self.recipe.ignore if (re.match(p[3:], name) if p.startswith("re:") else p == name)}
        used |= hits
        return bool(hits)

    def _scheme(self, name: str, projection: Projection) -> WeightScheme:
        activations, group, columns = self.recipe.scheme.endswith("a8"), self.recipe.group_size, projection.columns
        rotates = self.recipe.rotate and activations and projection.gated
        rotation = largest_rotation(columns) if rotates else 0
        eight = WeightScheme(8, None, activations, packed=not activations, rotation=rotation)
        if self.recipe.scheme in ("int8", "w8a8"):
            return eight
        if group != -1 and columns % group:
            self.eight_bits.append(name)
            return eight
        return replace(eight, bits=4, group=None if group == -1 else group)

    def groups(self) -> tuple[dict[WeightScheme, list[str]], list[str], dict[int, list[str]]]:
        """(targets by scheme, modules that stay plain, rotated ones by block), as config.json names them."""
        found: dict[WeightScheme, list[str]] = {}
        rotated: dict[int, list[str]] = {}
        for name, scheme in self.schemes.items():
            found.setdefault(replace(scheme, rotation=0), []).append(name)
            if scheme.rotation:
                rotated.setdefault(scheme.rotation, []).append(name)
        of_layers = [replace(scheme, rotation=0) for name, scheme in self.schemes.items() if name != HEAD]
        if of_layers:
            found[max(of_layers, key=lambda scheme: len(found[scheme]))] = ["Linear"]
        plain = [name for name in (*self.config.modules, HEAD) if name not in self.schemes]
        return found, plain, rotated

    def plan(self) -> list[Planned]:
        """Every tensor of the new checkpoint."""
        sources, replaced = self._sources(), self._replaced()
        plan: list[Planned] = []
        for name, (_, stored) in self.homes.items():
            if name not in replaced:
                plan.append((name, stored.dtype, stored.shape))
        for module, scheme in self.schemes.items():
            n, k = self.homes[sources[module]][1].shape
            groups = 1 if scheme.group is None else k // scheme.group
            if scheme.packed:
                plan.append((f"{module}.weight_packed", "I32", (n, -(-k * scheme.bits // 32))))
                plan.append((f"{module}.weight_shape", "I64", (2,)))
            else:
                plan.append((f"{module}.weight", "I8", (n, k)))
            plan.append((f"{module}.weight_scale", "BF16", (n, groups)))
        return plan

    def _sources(self) -> dict[str, str]:
        """The tensor that each module is made from; a tied head may be stored as the token table."""
        sources = {module: f"{module}.weight" for module in self.schemes}
        if HEAD in sources and sources[HEAD] not in self.homes:
            sources[HEAD] = TABLE
        return sources

    def _replaced(self) -> set[str]:
        """The tensors that are not copied. Of a tied head neither name: both would be one matrix."""
        tied = {f"{HEAD}.weight", TABLE} if HEAD in self.schemes and self.config.tied_embeddings else set()
        return tied | set(self._sources().values())

    def write(self, writer: ShardWriter, rows: Tensor | None, tell: Tell) -> None:
        sources, replaced = self._sources(), self._replaced()
        for name, (path, stored) in self.homes.items():
            if name not in replaced:
                writer.write(name, memoryview(_raw(path, stored)))
        total = self.config.num_layers
        layers = None if rows is None else CalibratedLayers(self.config, rows, self._tensor)
        for layer in range(total):
            tell("quantizing layers", layer, total)
            if layers is None:
                for module, scheme in self.schemes.items():
                    if module.startswith(f"model.layers.{layer}."):
                        weight, grid = self._tensor(sources[module]), Grid(scheme.bits, scheme.group)
                        self._write(writer, module, round_to_nearest(weight, grid, scheme.rotation))
            else:
                self._calibrate(layers, layer, writer)
        if HEAD in self.schemes:
            self._write(writer, HEAD, round_to_nearest(self._tensor(sources[HEAD]), Grid(8, None)))
        tell("quantizing layers", total, total)

    def _calibrate(self, layers: CalibratedLayers, layer: int, writer: ShardWriter) -> None:
        """One layer with GPTQ, matrix by matrix: each sees inputs that come through those before it, rounded."""
        for matrix in layers.matrices(layer):
            parts = [(route, route.source.removesuffix(".weight")) for route in _parts(self.routes, matrix.target)]
            scheme = self.schemes.get(parts[0][1])
            if scheme is None:
                continue
            hessian = matrix.hessian()
            if not hessian.isfinite().all():
                raise QuantizeError(f"{parts[0][1]}: its inputs on the calibration text are not finite")
            weight, block = matrix.weight, scheme.rotation
            if block:
                weight, hessian = rotate(weight, block), rotate(rotate(hessian, block).T, block)
            done, error = gptq(weight, hessian, Grid(scheme.bits, scheme.group))
            self.errors[matrix.target] = error
            for route, module in parts:
                self._write(writer, module, done.rows(*(route.rows or (0, len(done.integers)))))
            matrix.replace(rotate(done.values(), block) if block else done.values())

    def _write(self, writer: ShardWriter, module: str, rounded: Rounded) -> None:
        scheme = self.schemes[module]
        if not rounded.scales.isfinite().all():
            raise QuantizeError(f"{module}: its weights are too large to be rotated")
        if scheme.packed:
            writer.write(f"{module}.weight_packed", _bytes(pack_words(rounded.integers, scheme.bits)))
            writer.write(f"{module}.weight_shape", _bytes(torch.tensor(rounded.integers.shape)))
        else:
            writer.write(f"{module}.weight", _bytes(rounded.integers))
        writer.write(f"{module}.weight_scale", _bytes(rounded.scales.bfloat16()))

    def _tensor(self, name: str) -> Tensor:
        """A stored tensor in float32."""
        path, stored = self.homes[name]
        values = torch.frombuffer(_raw(path, stored), dtype=FLOAT_DTYPES[stored.dtype]).view(stored.shape).float()
        if not values.isfinite().all():
            raise QuantizeError(f"{path}: {name} has values that are not finite")
        return values


def _parts(routes: Sequence[Route], target: str) -> list[Route]:
    return [route for route in routes if route.target == target]


def _raw(path: Path, stored: StoredTensor) -> bytearray:
    raw = bytearray(stored.end - stored.start)
    with open(path, "rb", buffering=0) as file:
        file.seek(stored.start)
        at = 0
        while at < len(raw):
            count = file.readinto(memoryview(raw)[at:])
            if not count:
                raise QuantizeError(f"{path}: ends inside {stored.name}: it changed meanwhile")
            at += count
    return raw


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
