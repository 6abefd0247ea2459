"""quantization_config to schemes: what is understood, what is refused and by which name, and what it weighs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.nn.weights.compressed import CONFIG, SCHEMES, TOKEN, args, group, quantization_config

from penstock.config.complete import complete
from penstock.config.hardware import probe
from penstock.config.load import resolve
from penstock.config.memory import weight_bytes
from penstock.config.model import ModelConfigError, load_model_config, parse_model_config
from penstock.config.quantization import UnsupportedQuantization, WeightScheme, describe, parse_quantization
from penstock.config.values import ConfigError

NAMES = {
    "int4": ("int4", "int4"),
    "int4 in whole rows": ("int4", "int4"),
    "int4 in groups of 256": ("int4", "int4"),
    "int8": ("int8", "int8"),
    "w8a8": ("w8a8", "w8a8"),
    "w4a8": ("w4a8", "w4a8"),
    "naive": ("int8", "int8"),
    "int4 in groups of 32": ("int4", None),
    "int8 in groups of 128": ("int8", None),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_have_a_name_and_a_format_of_kernels(scheme: str) -> None:
    stored, own = SCHEMES[scheme]
    found = parse_quantization(quantization_config(stored, own)).groups[0].scheme
    assert (found.name, found.native) == NAMES[scheme]
    assert found.packed == (stored == "pack-quantized")


def test_a_name_beats_a_pattern_beats_a_class() -> None:
    found = parse_quantization(
        quantization_config(
            "pack-quantized",
            group(args(4, 128)),
            group(args(8), targets=["re:.*down_proj$"]),
            group(args(4, 256), targets=["model.layers.1.mlp.down_proj", "lm_head"]),
            ignore=["model.layers.0.mlp.up_proj", "re:.*self_attn.*"],
        )
    )

    def scheme(name: str, kind: str = "Linear") -> tuple[int, int | None] | None:
        own = found.scheme_of(name, kind)
        return None if own is None else (own.bits, own.group)

    assert scheme("model.layers.0.mlp.gate_proj") == (4, 128)
    assert scheme("model.layers.0.mlp.down_proj") == (8, None)
    assert scheme("model.layers.1.mlp.down_proj") == (4, 256)
    assert scheme("lm_head") == (4, 256)
    assert scheme("model.layers.0.mlp.up_proj") is None
    assert scheme("model.layers.1.self_attn.q_proj") is None
    assert scheme("model.embed_tokens", "Embedding") is None
    assert found.name(["model.layers.0.mlp.gate_proj"]) == "int4"
    assert found.name(["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]) == "mixed"


def test_a_group_may_have_a_format_of_its_own() -> None:
    found = parse_quantization(
        quantization_config(
            "mixed-precision",
            group(args(4, 128), format="pack-quantized"),
            group(args(8), TOKEN, format="int-quantized", targets=["lm_head"]),
            ignore=None,
        )
    )
    assert [each.scheme.name for each in found.groups] == ["int4", "w8a8"]


PACKED, INTS = "pack-quantized", "int-quantized"


def transforms(first: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A config of rotated inputs; `first` changes what happens to the input, `changes` the transform."""
    apply = [
        {"targets": ["re:.*down_proj$"], "location": "input", "inverse": False, "ignore": []},
        {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True, "ignore": []},
    ]
    apply[0] |= first or {}
    made = {"type": "hadamard", "head_dim": 64, "randomize": False, "apply": apply} | changes
    return quantization_config(INTS, group(args(8), TOKEN), transform_config={"config_groups": {"R4": made}})


def test_rotated_modules() -> None:
    found = parse_quantization(transforms())
    plain, rotated = (found.scheme_of(f"model.layers.0.mlp.{name}_proj") for name in ("up", "down"))
    assert plain is not None
    assert (plain.rotation, rotated) == (0, replace(plain, rotation=64))
    assert (plain.name, rotated and rotated.name) == ("w8a8", "w8a8")


REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ("awq", "must be an object"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"quantized checkpoints \(gptq\) are not supported"),
    "fp8": (
        quantization_config("float-quantized", group(args(8, type="float"), TOKEN)),
        "group_0: format 'float-quantized' is not supported",
    ),
    "fp8 weights": (quantization_config(INTS, group(args(8, type="float"))), "weights: 8-bit float is not supported"),
    "nvfp4": (quantization_config("nvfp4-pack-quantized", group(args(4, 16, type="float"))), "nvfp4-pack-quantized"),
    "3 bits": (quantization_config(PACKED, group(args(3, 128))), "weights: 3-bit int is not supported"),
    "zero points": (quantization_config(PACKED, group(args(4, 128, symmetric=False))), "zero points"),
    "act-order": (quantization_config(PACKED, group(args(4, 128, actorder="group"))), r"actorder 'group' \(g_idx\)"),
    "act-order, old": (quantization_config(PACKED, group(args(4, 128, actorder=True))), "actorder True"),
    "blocks": (quantization_config(INTS, group(args(8, strategy="block"))), "strategy 'block'"),
    "no group size": (quantization_config(PACKED, group(args(4, strategy="group"))), "group_size must be positive"),
    "static inputs": (
        quantization_config(INTS, group(args(8), args(8, strategy="tensor"))),
        "input_activations: static scales",
    ),
    "inputs per tensor": (
        quantization_config(INTS, group(args(8), args(8, strategy="tensor", dynamic=True))),
        "strategy 'tensor' is not supported, only token",
    ),
    "4-bit inputs": (
        quantization_config(INTS, group(args(4), args(4, strategy="token", dynamic=True))),
        "input_activations: 4-bit int",
    ),
    "outputs": (quantization_config(INTS, group(args(8), TOKEN, output_activations=TOKEN)), "output_activations"),
    "a KV cache": (quantization_config(PACKED, group(args(8)), kv_cache_scheme=args(8)), "kv_cache_scheme"),
    "sparse": (
        quantization_config(PACKED, group(args(8)), sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config",
    ),
    "not compressed": (quantization_config(PACKED, group(args(8)), quantization_status="frozen"), "'frozen'"),
    "no groups": (quantization_config(PACKED), "config_groups"),
    "a group that is none": (quantization_config(PACKED) | {"config_groups": {"a": 3}}, "a: must be an object"),
    "weights that are none": (quantization_config(PACKED, group(None)), "weights: must be an object"),  # type: ignore[arg-type]
    "a broken pattern": (quantization_config(PACKED, group(args(8)), ignore=["re:("]), "is not a pattern"),
    "a transform that is none": (
        quantization_config(INTS, group(args(8), TOKEN), transform_config={"config_groups": {"R1": 3}}),
        "transform_config: R1: must be an object",
    ),
    "transforms of what": (
        quantization_config(INTS, group(args(8), TOKEN), transform_config={"R1": {}}),
        "must be an object with config_groups",
    ),
    "a random transform": (transforms(type="random-hadamard"), "only transforms of type hadamard"),
    "a randomized transform": (transforms(randomize=True), "not randomized"),
    "a transform of all columns": (transforms(head_dim=None), "head_dim None is not supported; supported: 16, 32, 64"),
    "a transform of 256": (transforms(head_dim=256), "head_dim 256"),
    "a transform of outputs": (transforms({"location": "output"}), "an input and of the weight it meets"),
    "transformed differently": (transforms({"targets": ["lm_head"]}), "in different modules"),
    "a place that is none": (transforms({"location": ["input"]}), "an input and of the weight it meets"),
    "half a number": (transforms(head_dim=64.0), "head_dim 64.0"),
    "nothing is transformed": (transforms(apply=None), "apply must be a list"),
    "names that are none": (quantization_config(PACKED, group(args(8), targets=[3])), "must be a list of names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_named_before_weights_are_read(case: str) -> None:
    raw, text = REFUSED[case]
    with pytest.raises(ModelConfigError, match=text) as error:
        parse_model_config(CONFIG | {"quantization_config": raw})
    assert "\n" not in str(error.value)


def test_what_it_leaves_alone() -> None:
    raw = quantization_config(
        PACKED, group(args(8)), sparsity_config={"format": "dense"}, version="0.9", kv_cache_scheme={}
    )
    assert parse_quantization(raw).groups[0].scheme.name == "int8"
    with pytest.raises(UnsupportedQuantization):
        parse_quantization([])
    assert parse_model_config(CONFIG | {"quantization_config": None}).quantization is None


@pytest.mark.parametrize("activations", [False, True])
def test_what_is_written_is_what_is_read(activations: bool) -> None:
    layers = WeightScheme(4, 128, activations, packed=not activations)
    eight = WeightScheme(8, None, activations, packed=not activations)
    rotated = {64: ["z", "re:lm_.*"]}
    described = describe({layers: ["Linear"], eight: ["lm_head", "x"]}, ["y"], rotated if activations else None)
    found = parse_quantization(json.loads(json.dumps(described)))
    if activations:
        assert found.scheme_of("z") == replace(layers, rotation=64)
        eight = replace(eight, rotation=64)
        assert found.scheme_of("lm_head") == eight
        found = replace(found, rotated=())
        eight = replace(eight, rotation=0)
    assert (found.scheme_of("any"), found.scheme_of("x"), found.scheme_of("lm_head")) == (layers, eight, eight)
    assert found.scheme_of("y") is None


@pytest.fixture
def int4(tmp_path: Path) -> Path:
    raw = CONFIG | {"quantization_config": quantization_config(*SCHEMES["int4"])}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def resolved(directory: Path, **settings: Any) -> Any:
    return complete(resolve({"model": str(directory), **settings}), replace(probe(), memory_free_bytes=8 << 30))


def test_quantization_means_what_the_checkpoint_says(int4: Path) -> None:
    assert resolved(int4).config.model.quantization == "int4"
    assert resolved(int4).config.model.dtype == "bfloat16"
    assert resolved(int4, quantization="int4").config.model.quantization == "int4"
    assert resolved(int4, quantization="compressed-tensors").config.model.quantization == "int4"
    for other in ("none", "int8", "w4a8"):
        with pytest.raises(ConfigError, match=f"{other} was asked for, .* quantized already: int4"):
            resolved(int4, quantization=other)


def test_the_memory_plan_counts_what_is_stored(int4: Path) -> None:
    model = load_model_config(int4)
    head, layers = (
        model.vocab_size * model.hidden_size,
        2 * sum(sum(each.rows) * each.columns for each in model.projections),
    )
    rest = model.num_parameters - head - layers
    assert weight_bytes(model, "bfloat16", "int4") == 2 * (head + rest) + layers * (0.5 + 4 / 128)
    assert resolved(int4).memory.weights_bytes == weight_bytes(model, "bfloat16", "int4")
    assert "in int4" in dict(resolved(int4).memory.rows)["weights"]
    plain = resolved(int4, cpu_kernels="torch", dtype="float32")  # becomes plain numbers there
    assert plain.memory.weights_bytes == 4 * model.num_parameters
    twelve = weight_bytes(replace(model, quantization=None), "bfloat16", "bf12")
    assert twelve == pytest.approx(1.51 * model.num_parameters)
    untied = replace(model, tied_embeddings=False)
    assert weight_bytes(untied, "bfloat16", "int4") == weight_bytes(model, "bfloat16", "int4") + 2 * head
