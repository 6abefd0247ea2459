"""`quantization_config` of a checkpoint to schemes: which modules hold integers, of how many bits, with which scales.

Knows the compressed-tensors format (what vLLM and llm-compressor read and write) as far as config.json goes. Does not
know tensors, kernels or what is in the files. Source: github.com/vllm-project/compressed-tensors, quant_args.py,
quant_scheme.py, utils/match.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
NATIVE_GROUP = 128  # K elements that share a scale in native 4-bit weights
ROTATIONS = (16, 32, 64, 128)  # neighbours along K that native kernels rotate


class UnsupportedQuantization(ValueError):
    """The checkpoint is quantized in a way that cannot be loaded. The text says which, without the file's name."""


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of some modules are stored: symmetric signed integers times scales along K.

    `group`: K elements that share a scale; None: one scale per output row, or per matrix where `per_matrix`.
    `activations`: inputs are rounded to 8 bits with a scale per token while running. `packed`: integers lie in int32
    words, else one in each int8. `rotation`: neighbours along K that were multiplied by the Hadamard matrix of their
    number over its root before they were rounded, and inputs with them; 0: none.
    """

    bits: int
    group: int | None
    activations: bool
    packed: bool
    per_matrix: bool = False
    rotation: int = 0

    @property
    def name(self) -> str:
        """As `--quantization` says it: "int8", "w8a8", "int4", "w4a8"."""
        return f"w{self.bits}a8" if self.activations else f"int{self.bits}"

    @property
    def native(self) -> str | None:
        """The kernels' format that holds these integers and scales exactly; None: they become plain numbers."""
        whole = self.group is None or (self.bits == 4 and self.group % NATIVE_GROUP == 0)
        return self.name if whole else None


@dataclass(frozen=True, slots=True)
class SchemeGroup:
    """Modules by name, "re:" pattern or class, and their scheme."""

    targets: tuple[str, ...]
    scheme: WeightScheme


@dataclass(frozen=True, slots=True)
class Rotated:
    """Modules, as in a SchemeGroup, whose inputs are rotated in blocks of so many neighbours, as their weights were.

    `name`: of the transform, under which its matrix may be stored: "{module}.{name}_input.weight".
    """

    name: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    block: int


@dataclass(frozen=True, slots=True)
class CheckpointQuantization:
    """What config.json says about a quantized checkpoint."""

    groups: tuple[SchemeGroup, ...]
    ignore: tuple[str, ...]
    rotated: tuple[Rotated, ...] = ()

    def scheme_of(self, module: str, kind: str = "Linear") -> WeightScheme | None:
        """The scheme of a module ("model.layers.0.mlp.up_proj") of a class; None where it is not quantized.

        The most telling target wins: a name, then a pattern, then a class.
        """
        if _any_matches(module, kind, self.ignore):
            return None
        matching = [
            (_rank(target, module), number)
            for number, group in enumerate(self.groups)
            for target in group.targets
            if _matches(module, kind, target)
        ]
        if not matching:
            return None
        rotations = self.rotations_of(module, kind)
        return replace(self.groups[min(matching)[1]].scheme, rotation=rotations[0].block if rotations else 0)

    def rotations_of(self, module: str, kind: str = "Linear") -> list[Rotated]:
        """What rotates a module's inputs, quantized or not; nobody can use more than one."""
        return [
            each
            for each in self.rotated
            if _any_matches(module, kind, each.targets) and not _any_matches(module, kind, each.ignore)
        ]

    def name(self, modules: Iterable[str]) -> str:
        """One name for a model with these modules: theirs where all agree, else "mixed"; "none" where none is."""
        names = {"none" if scheme is None else scheme.name for scheme in map(self.scheme_of, modules)}
        return names.pop() if len(names) == 1 else "mixed"


def _any_matches(module: str, kind: str, targets: Iterable[str]) -> bool:
    return any(_matches(module, kind, target) for target in targets)


def _matches(module: str, kind: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, kind)


def _rank(target: str, module: str) -> int:
    return 0 if target == module else 1 if target.startswith("re:") else 2


def parse_quantization(raw: Any) -> CheckpointQuantization:
    """Check and translate a `quantization_config`. Raises UnsupportedQuantization, naming what cannot be loaded."""
    if not isinstance(raw, dict):
        raise UnsupportedQuantization(f"quantization_config must be an object, found {raw!r:.80}")
    method = raw.get("quant_method", "unknown")
    if method != METHOD:
        raise UnsupportedQuantization(
            f"quantized checkpoints ({method!s:.40}) are not supported; supported: {METHOD} with integer weights"
        )
    for key, what in (
        ("kv_cache_scheme", "a quantized KV cache"),
        ("sparsity_config", "sparse weights"),
    ):
        value = raw.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise UnsupportedQuantization(f"quantization_config: {key}: {what} are not supported")
    status = raw.get("quantization_status", "compressed")
    if status != "compressed":
        raise UnsupportedQuantization(f"quantization_config: quantization_status {status!r:.40} is not supported")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UnsupportedQuantization("quantization_config: config_groups must be an object with at least one group")
    common = raw.get("format")
    found = tuple(_group(f"quantization_config: {name!s:.40}", group, common) for name, group in groups.items())
    ignore = _patterns("quantization_config: ignore", raw.get("ignore"))
    return CheckpointQuantization(found, ignore, _rotations(raw.get("transform_config")))


def _rotations(config: Any) -> tuple[Rotated, ...]:
    """Supported transforms: Hadamard matrices in front of projections whose weights hold the inverse."""
    where = "quantization_config: transform_config"
    if not config:
        return ()
    groups = config.get("config_groups") if isinstance(config, dict) else None
    if not isinstance(groups, dict):
        raise UnsupportedQuantization(f"{where}: must be an object with config_groups, found {config!r:.80}")
    return tuple(_rotation(f"{where}: {name!s:.40}", str(name), group) for name, group in groups.items())


def _rotation(where: str, name: str, group: Any) -> Rotated:
    if not isinstance(group, dict):
        raise UnsupportedQuantization(f"{where}: must be an object, found {group!r:.80}")
    if group.get("type") != "hadamard" or group.get("randomize"):
        raise UnsupportedQuantization(f"{where}: only transforms of type hadamard, not randomized, are supported")
    block = group.get("head_dim")
    if type(block) is not int or block not in ROTATIONS:
        supported = ", ".join(map(str, ROTATIONS))
        raise UnsupportedQuantization(f"{where}: head_dim {block!r:.20} is not supported; supported: {supported}")
    apply = group.get("apply")
    if not isinstance(apply, list) or not all(isinstance(each, dict) for each in apply):
        raise UnsupportedQuantization(f"{where}: apply must be a list of objects, found {apply!r:.80}")
    if sorted(str(each.get("location")) for each in apply) != ["input", "weight_input"]:
        raise UnsupportedQuantization(f"{where}: only transforms of an input and of the weight it meets are supported")
    names = [
        (_patterns(f"{where}: targets", each.get("targets")), _patterns(f"{where}: ignore", each.get("ignore")))
        for each in apply
    ]
    if names[0] != names[1]:
        raise UnsupportedQuantization(f"{where}: inputs and weights are transformed in different modules")
    return Rotated(name, *names[0], block)


def _group(where: str, group: Any, common: Any) -> SchemeGroup:
    if not isinstance(group, dict):
        raise UnsupportedQuantization(f"{where}: must be an object, found {group!r:.80}")
    stored = group.get("format") or common
    if stored not in FORMATS:
        raise UnsupportedQuantization(
            f"{where}: format {stored!r:.40} is not supported; supported: {', '.join(FORMATS)}"
        )
    if group.get("output_activations"):
        raise UnsupportedQuantization(f"{where}: quantized output_activations are not supported")
    inputs = group.get("input_activations")
    weights, bits = _integers_of(f"{where}: weights", group.get("weights"), (4, 8))
    if weights.get("dynamic"):
        raise UnsupportedQuantization(f"{where}: weights: dynamic scales are not supported")
    if weights.get("actorder") in (True, "group", "dynamic"):
        raise UnsupportedQuantization(f"{where}: weights: actorder {weights['actorder']!r} (g_idx) is not supported")
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    if strategy not in ("tensor", "channel", "group"):
        raise UnsupportedQuantization(f"{where}: weights: strategy {strategy!r:.40} is not supported")
    if strategy == "group" and not (type(group_size) is int and group_size > 0):
        raise UnsupportedQuantization(f"{where}: weights: group_size must be positive, found {group_size!r:.40}")
    if inputs is not None:
        inputs, _ = _integers_of(f"{where}: input_activations", inputs, (8,))
        if inputs.get("dynamic") is not True:
            raise UnsupportedQuantization(f"{where}: input_activations: static scales are not supported, only dynamic")
        if inputs.get("strategy") != "token":
            raise UnsupportedQuantization(
                f"{where}: input_activations: strategy {inputs.get('strategy')!r:.40} is not supported, only token"
            )
    scheme = WeightScheme(
        bits=bits,
        group=group_size if strategy == "group" else None,
        activations=inputs is not None,
        packed=stored == "pack-quantized",
        per_matrix=strategy == "tensor",
    )
    return SchemeGroup(_patterns(f"{where}: targets", group.get("targets")), scheme)


def _integers_of(where: str, args: Any, widths: tuple[int, ...]) -> tuple[dict[str, Any], int]:
    """The object itself and the number of bits of its symmetric integers."""
    if not isinstance(args, dict):
        raise UnsupportedQuantization(f"{where}: must be an object, found {args!r:.80}")
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    if kind != "int" or bits not in widths:
        supported = " or ".join(map(str, widths))
        raise UnsupportedQuantization(
            f"{where}: {bits!r:.20}-bit {kind!s:.20} is not supported; supported: int of {supported} bits"
        )
    if args.get("symmetric", True) is not True:
        raise UnsupportedQuantization(f"{where}: zero points (symmetric: false) are not supported")
    return args, int(bits)


def _patterns(where: str, value: Any) -> tuple[str, ...]:
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnsupportedQuantization(f"{where}: must be a list of names, found {value!r:.80}")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise UnsupportedQuantization(f"{where}: {name!r:.80} is not a pattern: {error}") from None
    return tuple(names)


def describe(
    groups: dict[WeightScheme, list[str]], ignore: list[str], rotated: dict[int, list[str]] | None = None
) -> dict[str, Any]:
    """A `quantization_config` that says this: targets (names, patterns, classes) by scheme, and by block of rotation,
    which no scheme has here. The inverse of parsing.
    """
    assert not any(scheme.rotation for scheme in groups)
    formats = {scheme: "pack-quantized" if scheme.packed else "int-quantized" for scheme in groups}
    found: dict[str, Any] = {}
    for number, (scheme, targets) in enumerate(groups.items()):
        weights = _integers(scheme.bits, "channel" if scheme.group is None else "group", scheme.group, dynamic=False)
        found[f"group_{number}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": _integers(8, "token", None, dynamic=True) if scheme.activations else None,
            "output_activations": None,
            "format": formats[scheme],
        }
    transforms = {
        f"R{block}": {
            "type": "hadamard",
            "apply": [
                {"targets": targets, "location": "input", "inverse": False, "ignore": []},
                {"targets": targets, "location": "weight_input", "inverse": True, "ignore": []},
            ],
            "head_dim": block,
        }
        for block, targets in (rotated or {}).items()
    }
    return {
        "quant_method": METHOD,
        "format": next(iter(formats.values())) if len(set(formats.values())) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": found,
        "ignore": ignore,
        **({"transform_config": {"config_groups": transforms}} if transforms else {}),
    }


def _integers(bits: int, strategy: str, group_size: int | None, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }
