"""Attention and feed-forward blocks against plain arithmetic with unfused weights."""

from __future__ import annotations

import pytest
import torch
from tests.nn.dense_attention import DenseAttention, dense_batch
from tests.nn.weights.files import dummy_model, tensors_of, tiny_config

from penstock.nn.layers.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")


def test_feed_forward_is_silu_gated() -> None:
    """down(silu(gate(x)) * up(x)), gate rows before up rows in the fused projection."""
    config = tiny_config(architectures=["LlamaForCausalLM"], mlp_bias=True)
    model = dummy_model(config)
    w = {name.removeprefix("model.layers.1.mlp."): t for name, t in tensors_of(model).items() if "layers.1.mlp" in name}
    x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1))
    gate = x @ w["gate_proj.weight"].T + w["gate_proj.bias"]
    up = x @ w["up_proj.weight"].T + w["up_proj.bias"]
    expected = (gate * gate.sigmoid() * up) @ w["down_proj.weight"].T + w["down_proj.bias"]
    torch.testing.assert_close(model.layers[1].mlp(x), expected)


class Recorder:
    """Stands where attention stands and keeps what it was given."""

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.layer, self.q, self.k, self.v = layer, q, k, v
        return q.reshape(len(q), -1)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@torch.no_grad()
def test_what_attention_is_given(architecture: str) -> None:
    """q, k rotated and (Qwen3) normalised per head, v as projected, the layer's own index; shapes as in doors.py."""
    config = tiny_config(architectures=[architecture], head_dim=10)
    model = dummy_model(config)
    prefix = "model.layers.1.self_attn."
    w = {name.removeprefix(prefix): t for name, t in tensors_of(model).items() if name.startswith(prefix)}
    x = torch.randn(6, config.hidden_size, generator=torch.Generator().manual_seed(1))
    batch = dense_batch(config, [[0] * 6])
    batch.attention = recorder = Recorder()
    cos, sin = model.rotary.gather(batch.positions, x.dtype)
    result = model.layers[1].attention(x, batch, cos, sin)
    q, k, v = ((x @ w[f"{n}_proj.weight"].T + w.get(f"{n}_proj.bias", torch.zeros(()))).view(6, -1, 10) for n in "qkv")
    if architecture == "Qwen3ForCausalLM":
        for name, heads in (("q", q), ("k", k)):
            heads.mul_(torch.rsqrt(heads.square().mean(-1, keepdim=True) + config.norm_eps) * w[f"{name}_norm.weight"])
    tables = Rotary(10, 6, config.rope_theta, None)

    def turned(heads: torch.Tensor) -> torch.Tensor:
        left, right = heads[..., :5], heads[..., 5:]
        cos, sin = tables.cos[:, None], tables.sin[:, None]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    assert recorder.layer == 1
    assert (recorder.q.shape, recorder.k.shape, recorder.v.shape) == ((6, 4, 10), (6, 2, 10), (6, 2, 10))
    torch.testing.assert_close(recorder.q, turned(q))
    torch.testing.assert_close(recorder.k, turned(k))
    torch.testing.assert_close(recorder.v, v)
    torch.testing.assert_close(result, turned(q).reshape(6, 40) @ w["o_proj.weight"].T)


def test_dense_attention_of_the_tests_is_right() -> None:
    """The oracle itself: equal to torch's scaled_dot_product_attention per sequence, and a window of 3 sees 3."""
    config = tiny_config(architectures=["MistralForCausalLM"], sliding_window=3)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(7, heads, 6, generator=generator) for heads in (4, 2, 2))
    sequence_ids, positions = torch.tensor([0, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    ours = DenseAttention(config, sequence_ids, positions).run(0, q, k, v).view(7, 4, 6)
    for start, end in ((0, 5), (5, 7)):
        rows = torch.arange(end - start)
        mask = (rows[:, None] >= rows) & (rows[:, None] - rows < 3)
        parts = (t[start:end].transpose(0, 1) for t in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(ours[start:end], expected.transpose(0, 1))
