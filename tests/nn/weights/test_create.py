"""Allocation without initialisation, and random weights that are worth testing with."""

from __future__ import annotations

import pytest
import torch
from tests.nn.dense_attention import dense_logits
from tests.nn.weights.files import dummy_model, tiny_config

from penstock.nn.models import build_model, create_model
from penstock.nn.weights.create import init_dummy

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_allocated_model_has_the_shapes_of_a_built_one(dtype: torch.dtype, tied: bool) -> None:
    """Parameters in `dtype`, no gradients, ties kept; rotary tables equal those of a built model, in float32."""
    config = tiny_config(tie_word_embeddings=tied)
    built, created = build_model(config), create_model(config, dtype)
    shapes = {name: p.shape for name, p in built.named_parameters()}
    assert {name: p.shape for name, p in created.named_parameters()} == shapes
    assert {(p.dtype, p.device.type, p.requires_grad) for p in created.parameters()} == {(dtype, "cpu", False)}
    assert all(p.requires_grad for p in built.parameters()), "a built model can be trained"
    assert (created.head.weight is created.embed.weight) == tied
    assert torch.equal(created.rotary.cos, built.rotary.cos)
    assert torch.equal(created.rotary.sin, built.rotary.sin)
    assert created.rotary.cos.dtype == torch.float32
    assert not created.training
    assert "rotary.cos" not in created.state_dict()
    assert sum(p.numel() for p in created.parameters()) == config.num_parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(24, 2, 97), (64, 4, 2000)])
def test_dummy_logits_are_spread(architecture: str, tied: bool, shape: tuple[int, int, int]) -> None:
    """Standard deviation >= 2 at every position, and the best token is not simply the last one again."""
    hidden, num_layers, vocab = shape
    config = tiny_config(
        architectures=[architecture],
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    prompt = torch.randint(0, vocab, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = dense_logits(dummy_model(config, seed=3), [prompt])
    assert logits.isfinite().all()
    assert logits.std(-1).min() >= 2
    repeats = (logits.argmax(-1) == torch.tensor(prompt)).float().mean()
    assert repeats < 0.5


def test_dummy_weights_depend_on_seed_and_name_only() -> None:
    """Same seed: equal values, rounded, in every dtype, whatever the global generator did. Other seed: other values."""
    torch.manual_seed(1)
    first = dummy_model(tiny_config(), seed=5)
    torch.manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16):
        again = dict(dummy_model(tiny_config(), dtype, seed=5).named_parameters())
        for name, parameter in first.named_parameters():
            assert torch.equal(again[name], parameter.to(dtype)), name
    other = dict(dummy_model(tiny_config(), seed=6).named_parameters())
    longer = dict(dummy_model(tiny_config(num_hidden_layers=3), seed=5).named_parameters())
    for name, parameter in first.named_parameters():
        assert not torch.equal(other[name], parameter), name
        assert torch.equal(longer[name], parameter), "a layer more changes no other layer"


def test_a_large_parameter_is_filled_to_its_end() -> None:
    """Random numbers are drawn in parts: the last, shorter one included, and no two parts are equal."""
    layer = torch.nn.Sequential(torch.nn.Linear(1 << 11, (1 << 12) + 3, bias=False))
    with torch.no_grad():
        layer[0].weight.fill_(torch.nan)
    init_dummy(layer, 0)
    weight = layer[0].weight.detach()
    assert weight.isfinite().all()
    assert not torch.equal(weight.view(-1)[: 1 << 22], weight.view(-1)[1 << 22 : 1 << 23])
