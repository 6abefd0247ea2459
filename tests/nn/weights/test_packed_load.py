"""Weights packed on their way from the file are the same as weights packed from a loaded model, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.weights.files import dummy_model, save, tensors_of, tiny_config

from penstock.config.model import ModelConfig
from penstock.nn.kernels.arena import begin_arena
from penstock.nn.kernels.native import FORMATS, PackedWeights, load_native, usable_kernels
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.errors import TiedWeightsDiffer, WrongDtype
from penstock.nn.weights.stream import load_weights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not usable_kernels(), reason="the native kernels were not built, or not for this machine"),
]


def qwen3(**changes: Any) -> ModelConfig:
    wide = {"hidden_size": 72, "intermediate_size": 48, "head_dim": 16, "vocab_size": 101}  # 101, 72: padded blocks
    return tiny_config(**{"architectures": ["Qwen3ForCausalLM"], **wide, **changes})


def projections(model: LlamaModel) -> list[torch.nn.Parameter]:
    layers: Any = model.layers
    found = [model.head.weight]
    for layer in layers:
        found += [
            layer.attention.qkv.weight,
            layer.attention.out.weight,
            layer.mlp.gate_up.weight,
            layer.mlp.down.weight,
        ]
    return found


def unpacked(weights: PackedWeights, model: LlamaModel) -> list[torch.Tensor]:
    found = []
    for parameter in projections(model):
        packed = weights.find(parameter)
        assert packed is not None
        found.append(torch.empty(packed.n, packed.k))
        packed.unpack(found[-1].numpy())
    return found


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("threads", "chunk_bytes"), [(1, 1 << 24), (3, 4096)])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_on_the_way(weight_format: str, threads: int, chunk_bytes: int, tied: bool, tmp_path: Path) -> None:
    """Fused projections come in pieces, gate and up in turns of a block; pieces end at blocks wherever chunks do."""
    source = dummy_model(qwen3(tie_word_embeddings=tied), torch.bfloat16)
    save(tmp_path, tensors_of(source), num_shards=2)
    formats = (weight_format, weight_format)
    expected = unpacked(PackedWeights(source, 1, formats), source)
    model = create_model(source.config, torch.bfloat16)
    weights = PackedWeights(model, 1, formats, begin_arena(1 << 20))
    memory = projections(model)[1].data
    memory.fill_(7)
    routes = model_routes(model.config)
    report = load_weights(tmp_path, model, routes, threads=threads, chunk_bytes=chunk_bytes, packer=weights)
    assert report.num_tensors == len(tensors_of(dummy_model(source.config)))
    assert (memory == 7).all(), "the parameter's own memory is not touched"
    assert not any(parameter.numel() for parameter in projections(model))
    assert torch.equal(model.norm.weight, source.norm.weight)
    for ours, theirs in zip(unpacked(weights, model), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_packed_on_the_way_is_packed_afterwards(tmp_path: Path) -> None:
    """A float32 part of a fused projection needs a cast: the whole projection is loaded first."""
    source = dummy_model(qwen3(), torch.bfloat16)
    tensors = tensors_of(source)
    name = "model.layers.0.self_attn.k_proj.weight"
    save(tmp_path, tensors | {name: tensors[name].float()})
    expected = unpacked(PackedWeights(source, 1), source)
    model = create_model(source.config, torch.bfloat16)
    weights = PackedWeights(model, 1)
    report = load_weights(tmp_path, model, model_routes(model.config), packer=weights)
    assert report.casts == {"F32 -> bfloat16": 1}
    for ours, theirs in zip(unpacked(weights, model), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])  # packed on the way; loaded first
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_no_number_has_no_integer(
    weight_format: str, stored: torch.dtype, value: float, tmp_path: Path
) -> None:
    source = dummy_model(qwen3(), torch.bfloat16)
    tensors = tensors_of(source)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(stored)
    tensors[name][-1, -1] = value
    save(tmp_path, tensors)
    model = create_model(source.config, torch.bfloat16)
    weights = PackedWeights(model, 2, (weight_format, weight_format))
    if weight_format in ("bf16", "bf12"):  # as it is: the request that meets it fails
        load_weights(tmp_path, model, model_routes(model.config), packer=weights)
        assert not torch.cat([w.flatten() for w in unpacked(weights, model)]).isfinite().all()
        return
    with pytest.raises(WrongDtype, match=r"safetensors: model.layers.0.mlp.(gate|up)_proj.weight: .*not a finite"):
        load_weights(tmp_path, model, model_routes(model.config), packer=weights)


def test_a_tied_tensor_that_is_stored_twice_is_named_too(tmp_path: Path) -> None:
    source = dummy_model(qwen3(tie_word_embeddings=True), torch.bfloat16)
    tensors = tensors_of(source)
    head = tensors["model.embed_tokens.weight"].float()
    head[3, 3] = torch.nan
    save(tmp_path, tensors | {"model.embed_tokens.weight": head, "lm_head.weight": head.clone()})
    model = create_model(source.config, torch.bfloat16)
    weights = PackedWeights(model, 1, ("int8", "int8"))
    with pytest.raises(WrongDtype, match=r"safetensors: (lm_head|model.embed_tokens).weight: .*not a finite"):
        load_weights(tmp_path, model, model_routes(model.config), packer=weights)


def test_tied_tensors_are_compared_in_the_files(tmp_path: Path) -> None:
    source = dummy_model(qwen3(tie_word_embeddings=True), torch.bfloat16)
    tensors = tensors_of(source)
    head = tensors["model.embed_tokens.weight"].clone()
    routes = model_routes(source.config)
    save(tmp_path, tensors | {"lm_head.weight": head})
    model = create_model(source.config, torch.bfloat16)
    weights = PackedWeights(model, 1)
    load_weights(tmp_path, model, routes, chunk_bytes=4096, packer=weights)
    ours = unpacked(weights, model)[0]
    assert torch.equal(ours, head.float())
    head[-1, -1] += 1
    save(tmp_path, tensors | {"lm_head.weight": head})
    model = create_model(source.config, torch.bfloat16)
    with pytest.raises(TiedWeightsDiffer, match=r"lm_head.weight differs"):
        load_weights(tmp_path, model, routes, chunk_bytes=4096, packer=PackedWeights(model, 1))


def test_an_arena_serves_until_it_is_full_and_lives_as_long_as_its_weights() -> None:
    native = load_native()
    arena = begin_arena(1)
    assert arena is not None
    values = torch.randn(1024, 512).bfloat16()  # 1 MiB: two fit into a huge page
    weights = [native.PackedWeight(FORMATS["bf16"], *values.shape, arena) for _ in range(3)]
    assert arena.taken_bytes == 2 * values.numel() * 2
    arena.finish()
    arena.finish()
    for weight in weights:
        weight.fill(None, 0, values.view(torch.uint16).numpy())
    del arena
    for weight in weights:
        found = torch.empty(values.shape)
        weight.unpack(found.numpy())
        assert torch.equal(found, values.float())


def test_rows_that_do_not_fit_are_refused() -> None:
    weight = load_native().PackedWeight(FORMATS["bf16"], 64, 64)
    rows = torch.zeros(32, 64, dtype=torch.bfloat16).view(torch.uint16).numpy()
    weight.fill(None, 16, rows, every=2)  # blocks 1 and 3
    for begin, every in ((32, 2), (0, 0), (8, 1), (48, 1), (0, 4)):
        with pytest.raises(ValueError, match="do not fit"):
            weight.fill(None, begin, rows, every=every)
    with pytest.raises(ValueError, match="do not fit"):
        weight.fill(None, 0, rows[:20], every=2)
