"""Rotary tables against transformers' own, and rotation against complex numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.config.model import RopeScaling, parse_model_config
from penstock.nn.layers.rotary import Rotary, inverse_frequencies, rotate

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama-3.1": LLAMA31,
    "llama-3.2": {**LLAMA31, "factor": 32.0},
    "qwen-yarn": QWEN_YARN,
    "yarn-scaled-attention": {**QWEN_YARN, "attention_factor": 0.8},
    "yarn-not-truncated": {**QWEN_YARN, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-mscale": {**QWEN_YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn-small-theta": {**QWEN_YARN, "rope_theta": 100.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name: str) -> None:
    """The scalings of published models, at their sizes: frequencies to 2e-7, the factor on cos and sin exactly."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 256,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 131072,
        "rope_parameters": SCALINGS[name],
    }
    config = parse_model_config(raw)
    ours, factor = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    kind = SCALINGS[name]["rope_type"]
    theirs, their_factor = ROPE_INIT_FUNCTIONS[kind](transformers.LlamaConfig(**raw), "cpu")
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
    assert factor == pytest.approx(their_factor, rel=1e-12)
    plain, _ = inverse_frequencies(config.head_dim, config.rope_theta, None)
    assert not torch.allclose(ours, plain, rtol=1e-3), "the scaling does something"


def test_rotation_is_a_complex_product() -> None:
    """Elements i and i + D/2 are a complex number that position p turns by p * theta^(-2i/D): in float64, to 1e-6."""
    rotary = Rotary(16, 1000, 10000.0, None)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, 16, generator=generator)
    positions = torch.tensor([0, 1, 2, 999, 500, 3, 3])
    cos, sin = rotary.gather(positions, torch.float32)
    assert cos.shape == sin.shape == (7, 1, 16)
    ours = rotate(x, cos, sin)
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    turned = (
        torch.complex(x[..., :8].double(), x[..., 8:].double())
        * torch.polar(torch.ones(7, 8).double(), angles)[:, None]
    )
    torch.testing.assert_close(ours.double(), torch.cat((turned.real, turned.imag), -1), rtol=0, atol=2e-4)
    torch.testing.assert_close(ours[:3].double(), torch.cat((turned.real, turned.imag), -1)[:3], rtol=0, atol=1e-6)
    assert torch.equal(ours[0], x[0]), "position 0 turns nothing"


def test_scores_depend_on_distance_only() -> None:
    """q at p + n and k at p give the same product for every p: what rope is for."""
    rotary = Rotary(32, 512, 10000.0, None)
    q, k = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(4)).expand(2, 100, 1, 32)
    near, far = torch.arange(100), torch.arange(100) + 17
    products = (rotate(q, *rotary.gather(far, q.dtype)) * rotate(k, *rotary.gather(near, k.dtype))).sum(-1)
    torch.testing.assert_close(products, products[:1].expand_as(products), rtol=1e-4, atol=1e-4)


def test_half_precision_tables_are_rounded_once() -> None:
    """Tables are float32 and rounded when they are gathered, so that far positions keep their angle."""
    rotary = Rotary(8, 5000, 10000.0, None)
    cos, _ = rotary.gather(torch.tensor([4999]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 0].item() == torch.tensor(math.cos(4999.0)).bfloat16().item()


def test_yarn_attention_factor_by_hand() -> None:
    """0.1 ln(factor) + 1, from the paper; cos and sin carry it."""
    scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position=64)
    expected = 0.1 * math.log(4) + 1
    assert inverse_frequencies(16, 10000.0, scaling)[1] == expected
    assert Rotary(16, 4, 10000.0, scaling).cos[0].tolist() == pytest.approx([expected] * 8)
