"""Compressed-tensors checkpoints: what arrives in kernels is what was stored, bit for bit; what is wrong is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.nn.dense_attention import dense_logits
from tests.nn.weights.compressed import CONFIG, SCHEMES, Stored, checkpoint

from penstock.config.model import load_model_config
from penstock.nn.kernels.native import FORMATS, PackedWeights, load_native, usable_kernels
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.quant.rotation import hadamard
from penstock.nn.weights.errors import (
    BadQuantization,
    CheckpointError,
    MissingTensor,
    TiedWeightsDiffer,
    WrongDtype,
    WrongShape,
)
from penstock.nn.weights.stream import LoadReport, load_weights

native = pytest.mark.skipif(not usable_kernels(), reason="the native kernels were not built, or not for this machine")
pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = [scheme for scheme in SCHEMES if scheme not in ("int4 in groups of 32", "int8 in groups of 128")]
PARTS = {
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}


def plain(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[LlamaModel, LoadReport]:
    """The model as plain torch has it."""
    config = load_model_config(directory)
    model = create_model(config, dtype)
    report = load_weights(directory, model, model_routes(config), quantization=config.quantization)
    return model, report


def packed(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], LlamaModel]:
    """What native kernels compute with, by parameter: float32 [N, K], and the packed weights themselves."""
    config = load_model_config(directory)
    model = create_model(config, torch.bfloat16)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = PackedWeights(model, 2)
    load_weights(
        directory,
        model,
        model_routes(config),
        packer=weights,
        quantization=config.quantization,
    )
    held, values = {names[key]: weight for key, weight in weights._packed.items()}, {}
    for name, weight in held.items():
        values[name] = np.zeros((weight.n, weight.k), np.float32)
        weight.unpack(values[name])
    return values, held, model


def expected(stored: Stored, parameter: str, layer: int) -> np.ndarray:
    """Rows of the fused parameter, in the checkpoint's order."""
    return np.concatenate([stored.values[f"model.layers.{layer}.{name}"] for name in PARTS[parameter]])


def blocks_in_turn(gate_up: np.ndarray) -> np.ndarray:
    """16 rows of gate, 16 of up, and so on: how kernels hold them."""
    gate, up = np.split(gate_up, 2)
    rows = [part[at : at + 16] for at in range(0, len(gate), 16) for part in (gate, up)]
    return np.concatenate(rows)


@native
@pytest.mark.parametrize(("scale", "shards"), [(torch.bfloat16, 1), (torch.float16, 5), (torch.float32, 2)])
@pytest.mark.parametrize("scheme", EXACT)
def test_integers_and_scales_arrive_bit_for_bit(tmp_path: Path, scheme: str, scale: torch.dtype, shards: int) -> None:
    """An integer of at most 8 bits times a scale of at most 16 is exact in float32; one of 24 rounds once."""
    stored = checkpoint(tmp_path, scheme, shards=shards, scale=scale)
    values, held, model = packed(tmp_path)
    for layer in range(2):
        for name in PARTS:
            want = expected(stored, name, layer)
            want = blocks_in_turn(want) if name == "mlp.gate_up" else want
            assert np.array_equal(values[f"layers.{layer}.{name}.weight"], want.astype(np.float32)), name
            weight = held[f"layers.{layer}.{name}.weight"]
            assert weight.num_bytes < 1.5 * weight.n * weight.k
    head = stored.values["model.embed_tokens"]
    assert np.array_equal(values["embed.weight"], head.astype(np.float32))  # tied, and kept in bf16
    assert model.layers[0].mlp.down.weight.numel() == 0  # what is packed is not held twice


@native
@pytest.mark.parametrize("weight_format", ["int8", "w8a8"])
@pytest.mark.parametrize("kernels", usable_kernels())
def test_the_lowest_integer_is_computed_with(kernels: str, weight_format: str) -> None:
    """-128 never comes of rounding here, and files may hold it: where products of bytes could overflow first."""
    team = load_native().Team(1, [])
    integers = np.full((16, 200), -128, np.int8)
    weight = load_native().PackedWeight(FORMATS[weight_format], *integers.shape)
    weight.fill_quantized(team, 0, 1, integers, np.ones((16, 1), np.float32))
    x = torch.stack((torch.ones(200), -torch.ones(200), torch.linspace(-1, 1, 200).round())).bfloat16()
    found = torch.zeros(3, 16)
    load_native().Program(kernels, team, 3).head(weight, x.view(torch.uint16).numpy(), found.numpy())
    want = x.float() @ torch.from_numpy(integers).float().T
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-3)


@native
@pytest.mark.parametrize("scheme", ["int4 in groups of 32", "int8 in groups of 128"])
def test_what_kernels_cannot_hold_becomes_bf16(tmp_path: Path, scheme: str) -> None:
    stored = checkpoint(tmp_path, scheme)
    values, held, _ = packed(tmp_path)
    want = torch.from_numpy(expected(stored, "attention.qkv", 1)).bfloat16().float().numpy()
    assert np.array_equal(values["layers.1.attention.qkv.weight"], want)
    assert held["layers.1.attention.qkv.weight"].num_bytes == 2 * want.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_torch_gets_the_same_numbers(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    stored = checkpoint(tmp_path, scheme, shards=2)
    model, report = plain(tmp_path, dtype)
    parameters = dict(model.named_parameters())
    for layer in range(2):
        for name in PARTS:
            want = torch.from_numpy(expected(stored, name, layer)).float().to(dtype)
            assert torch.equal(parameters[f"layers.{layer}.{name}.weight"], want)
    assert report.bytes == sum(tensor.nbytes for tensor in stored.tensors.values())
    assert report.num_tensors == len(stored.tensors)


@native
def test_what_config_ignores_stays_plain(tmp_path: Path) -> None:
    kept = [f"model.layers.0.{name}" for name in PARTS["mlp.gate_up"]]
    stored = checkpoint(tmp_path, "int4", quantization={"ignore": [*kept, "lm_head"]}, tie_word_embeddings=False)
    values, held, _ = packed(tmp_path)
    want = blocks_in_turn(expected(stored, "mlp.gate_up", 0)).astype(np.float32)
    assert np.array_equal(values["layers.0.mlp.gate_up.weight"], want)
    assert held["layers.0.mlp.gate_up.weight"].num_bytes > 2 * want.size - 1
    assert held["layers.1.mlp.gate_up.weight"].num_bytes < 0.6 * want.size
    assert np.array_equal(values["head.weight"], stored.values["lm_head"].astype(np.float32))


@native
def test_a_matrix_of_two_kinds_becomes_plain(tmp_path: Path) -> None:
    """q is bf16, k and v are integers: one product needs one format."""
    stored = checkpoint(tmp_path, "int8", quantization={"ignore": ["lm_head", "model.layers.0.self_attn.q_proj"]})
    values, _, _ = packed(tmp_path)
    want = torch.from_numpy(expected(stored, "attention.qkv", 0)).float().bfloat16().float().numpy()
    assert np.array_equal(values["layers.0.attention.qkv.weight"], want)


@native
@pytest.mark.parametrize("packed_format", [True, False])
def test_a_tied_head_that_is_stored_quantized_is_the_token_table_too(tmp_path: Path, packed_format: bool) -> None:
    stored = checkpoint(tmp_path, "int8" if packed_format else "w8a8", quantization={"ignore": []})
    stored.module("lm_head", CONFIG["vocab_size"], CONFIG["hidden_size"], 8, None, packed=packed_format)
    (tmp_path / "model.safetensors").unlink()
    both = dict(stored.tensors)
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(TiedWeightsDiffer, match="lm_head"):
        plain(tmp_path)
    both.pop("model.embed_tokens.weight")
    save_file(both, tmp_path / "model.safetensors")
    want = stored.values["lm_head"].astype(np.float32)
    assert np.array_equal(packed(tmp_path)[0]["embed.weight"], want)
    assert torch.equal(plain(tmp_path)[0].embed.weight, torch.from_numpy(want))


def test_one_scale_for_a_matrix(tmp_path: Path) -> None:
    own = SCHEMES["w8a8"][1]
    groups = {"group_0": own | {"weights": own["weights"] | {"strategy": "tensor"}}}
    stored = checkpoint(tmp_path, "w8a8", quantization={"config_groups": groups})
    name = "model.layers.0.mlp.down_proj"
    for tensor in stored.tensors:
        if tensor.endswith("weight_scale"):
            stored.tensors[tensor] = torch.tensor([0.5])
    save_file(stored.tensors, tmp_path / "model.safetensors")
    want = stored.tensors[f"{name}.weight"].float() * 0.5
    assert torch.equal(plain(tmp_path)[0].layers[0].mlp.down.weight, want)


def test_logits_are_those_of_the_numbers(tmp_path: Path) -> None:
    """The whole model beside one whose weights were filled in by hand."""
    stored = checkpoint(tmp_path, "int4")
    model, _ = plain(tmp_path)
    config = load_model_config(tmp_path)
    by_hand = create_model(config, torch.float32)
    parameters = dict(by_hand.named_parameters(remove_duplicate=False))
    for route in model_routes(config):
        if route.kind == "fill":
            values = stored.values[route.source.removesuffix(".weight")]
            parameters[route.target].data[slice(*(route.rows or (None,)))] = torch.from_numpy(values).float()
    prompts = [list(range(3, 60)), [7, 8, 9]]
    assert torch.equal(dense_logits(model, prompts), dense_logits(by_hand, prompts))


Damage = Callable[[dict[str, torch.Tensor]], Any]
DOWN = "model.layers.1.mlp.down_proj"


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def set_at(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[3, -1] = value
        return changed

    return change


DAMAGES: dict[str, tuple[str, Damage, type[CheckpointError], str]] = {
    "no scales": ("int4", lambda t: t.pop(f"{DOWN}.weight_scale"), MissingTensor, f"{DOWN}.weight_scale"),
    "no integers": ("int4", lambda t: t.pop(f"{DOWN}.weight_packed"), MissingTensor, f"{DOWN}.weight_packed"),
    "neither": ("w8a8", lambda t: [t.pop(f"{DOWN}.weight"), t.pop(f"{DOWN}.weight_scale")], MissingTensor, DOWN),
    "a group too few": (
        "int4",
        replaced(f"{DOWN}.weight_scale", lambda s: s[:, :1]),
        WrongShape,
        r"down_proj.weight_scale has shape \[256, 1\]",
    ),
    "a row too few": ("w8a8", replaced(f"{DOWN}.weight_scale", lambda s: s[1:]), WrongShape, r"\[255, 1\]"),
    "integers too narrow": ("int4", replaced(f"{DOWN}.weight_packed", lambda w: w[:, 1:]), WrongShape, "weight_packed"),
    "another shape said": (
        "int4",
        replaced(f"{DOWN}.weight_shape", lambda s: s + 1),
        WrongShape,
        r"weight_shape says \[257, 145\]",
    ),
    "a scale that is no number": (
        "int4",
        replaced(f"{DOWN}.weight_scale", set_at(torch.nan)),
        BadQuantization,
        "finite",
    ),
    "an infinite scale": ("w8a8", replaced(f"{DOWN}.weight_scale", set_at(torch.inf)), BadQuantization, "weight_scale"),
    "a scale too large": ("w8a8", replaced(f"{DOWN}.weight_scale", set_at(3e36)), BadQuantization, "products"),
    "5 bits in 4": ("w4a8", replaced(f"{DOWN}.weight", set_at(9)), BadQuantization, "outside of 4 bits"),
    "float integers": ("w8a8", replaced(f"{DOWN}.weight", torch.Tensor.float), WrongDtype, "F32"),
    "integer scales": ("w8a8", replaced(f"{DOWN}.weight_scale", lambda s: s.to(torch.int32)), WrongDtype, "I32"),
    "zero points": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(32, 2, dtype=torch.int32)}),
        BadQuantization,
        "weight_zero_point: zero points",
    ),
    "g_idx": (
        "int4",
        lambda t: t.update({f"{DOWN}.weight_g_idx": torch.arange(144, dtype=torch.int32)}),
        BadQuantization,
        "weight_g_idx",
    ),
    "static activations": (
        "w8a8",
        lambda t: t.update({f"{DOWN}.input_scale": torch.ones(1)}),
        CheckpointError,
        "no place for tensor model.layers.1.mlp.down_proj.input_scale",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_tensor(tmp_path: Path, damage: str) -> None:
    scheme, change, kind, text = DAMAGES[damage]
    stored = checkpoint(tmp_path, scheme)
    change(stored.tensors)
    save_file(stored.tensors, tmp_path / "model.safetensors")
    with pytest.raises(kind, match=text) as error:
        plain(tmp_path)
    assert "\n" not in str(error.value)


def rotating(block: int, *targets: str) -> dict[str, Any]:
    apply = [{"targets": list(targets), "location": place} for place in ("input", "weight_input")]
    return {"type": "hadamard", "head_dim": block, "apply": apply}


@pytest.mark.parametrize(
    ("scheme", "transforms", "text"),
    [
        ("w8a8", {"R4": rotating(64, "re:.*down_proj$")}, "144 columns are no whole blocks of 64"),
        ("int8", {"R4": rotating(16, "re:.*down_proj$")}, "supported where they are rounded to 8 bits"),
        ("w8a8", {"R4": rotating(16, DOWN), "R5": rotating(16, "re:.*layers.1.*")}, "rotates it twice"),
        ("w8a8", {"R4": rotating(16, "lm_head")}, "lm_head: transform_config rotates it, and it is not quantized"),
        ("w8a8", {"R4": rotating(16, DOWN), "R5": rotating(16, "re:down_proj")}, "'R5' rotates none of this model's"),
    ],
)
def test_rotations_that_cannot_be_used(tmp_path: Path, scheme: str, transforms: dict[str, Any], text: str) -> None:
    changes = {"transform_config": {"config_groups": transforms}}
    checkpoint(tmp_path, scheme, quantization=changes, tie_word_embeddings=False)
    with pytest.raises(BadQuantization, match=text):
        plain(tmp_path)


def with_rotated_down(directory: Path, *, matrix: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    """A w8a8 checkpoint whose down projections are rotated in blocks of 16; the weights that it stands for."""
    changes = {"transform_config": {"config_groups": {"R4": rotating(16, "re:.*down_proj$")}}}
    stored = checkpoint(directory, "w8a8", quantization=changes)
    if matrix is not None:  # one that modules share is stored once
        tensors = load_file(directory / "model.safetensors")
        save_file({**tensors, f"{DOWN}.R4_input.weight": matrix}, directory / "model.safetensors")
    turned = np.kron(np.eye(144 // 16), hadamard(16).numpy() / 4)
    return {name: values @ turned if "down_proj" in name else values for name, values in stored.values.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, None])
def test_rotated_weights_are_rotated_back_where_nobody_rotates_inputs(tmp_path: Path, dtype: Any) -> None:
    values = with_rotated_down(tmp_path, matrix=None if dtype is None else hadamard(16).to(dtype))
    model, _ = plain(tmp_path)
    for layer in range(2):
        down = torch.from_numpy(values[f"model.layers.{layer}.mlp.down_proj"]).float()
        torch.testing.assert_close(model.layers[layer].mlp.down.weight.detach(), down, rtol=1e-5, atol=1e-6)


@native
def test_rotated_weights_arrive_bit_for_bit(tmp_path: Path) -> None:
    values = with_rotated_down(tmp_path, matrix=hadamard(16))
    found, held, _ = packed(tmp_path)
    for layer in range(2):
        name = f"layers.{layer}.mlp.down.weight"
        np.testing.assert_allclose(found[name], values[f"model.layers.{layer}.mlp.down_proj"], rtol=1e-5, atol=1e-6)
        assert held[name].num_bytes < 1.5 * held[name].n * held[name].k


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (hadamard(16).flip(0), BadQuantization),
        (hadamard(16) / 4, BadQuantization),
        (hadamard(32), WrongShape),
        (hadamard(16).to(torch.int8), WrongShape),
    ],
)
def test_a_stored_matrix_that_is_another(tmp_path: Path, matrix: torch.Tensor, error: type[Exception]) -> None:
    with_rotated_down(tmp_path, matrix=matrix)
    with pytest.raises(error, match="R4_input.weight"):
        plain(tmp_path)


def test_a_module_that_is_quantized_against_what_config_says(tmp_path: Path) -> None:
    checkpoint(tmp_path, "int4")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append(DOWN)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadQuantization, match=DOWN):
        plain(tmp_path)


def test_a_file_that_ends_during_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, "int4")
    from penstock.nn.weights import stream

    real = stream.find_quantized

    def cut(*arguments: Any) -> Any:
        found = real(*arguments)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(file.seek(0, 2) - 20000)
        return found

    monkeypatch.setattr(stream, "find_quantized", cut)
    with pytest.raises(CheckpointError, match="ends"):
        plain(tmp_path)
