from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from penstock.training.dense import MAX_MATERIALISED, DenseCausalAttention, attention_for, next_token_loss


@pytest.mark.parametrize(("rows", "seq_len", "heads", "kv_heads"), [(1, 1, 2, 2), (3, 7, 4, 2), (2, 33, 6, 1)])
def test_both_forms_agree_with_attention_written_out(rows: int, seq_len: int, heads: int, kv_heads: int) -> None:
    """Values and gradients, float64: softmax(q k^T / sqrt(D)) v over the earlier positions of the same row."""
    torch.manual_seed(0)
    shape = (rows * seq_len, heads, 8)
    q = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(rows * seq_len, kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wanted = torch.empty(rows * seq_len, heads, 8, dtype=torch.float64)
    outs = []
    for t in range(rows * seq_len):
        first = t - t % seq_len
        for h in range(heads):
            g = h // (heads // kv_heads)
            chances = (k[first : t + 1, g] @ q[t, h] / 8**0.5).softmax(0)
            outs.append(chances @ v[first : t + 1, g])
    wanted = torch.stack(outs).view(rows * seq_len, heads * 8)
    push = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, (q, k, v), push)
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    for attention in (DenseCausalAttention(rows, seq_len, mask), DenseCausalAttention(rows, seq_len, None)):
        got = attention.run(0, q, k, v)
        torch.testing.assert_close(got, wanted)
        for grad, expected in zip(torch.autograd.grad(got, (q, k, v), push), grads, strict=True):
            torch.testing.assert_close(grad, expected)


def test_long_rows_take_the_fused_form() -> None:
    cpu = torch.device("cpu")
    assert attention_for(2, 64, cpu).mask is not None
    assert attention_for(1, 2 * MAX_MATERIALISED, cpu).mask is None


@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_loss_and_gradients_are_those_of_cross_entropy(chunk: int) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 31, (20,))
    targets[[0, 7, 19]] = -100
    wanted = functional.cross_entropy(hidden @ weight.T, targets, ignore_index=-100)
    expected = torch.autograd.grad(wanted, (hidden, weight))
    got = next_token_loss(hidden, weight, targets, chunk)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    for grad, other in zip(torch.autograd.grad(got, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert next_token_loss(hidden, weight, targets, chunk).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_bfloat16_loss_is_close() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(2048, 64), torch.randn(1000, 64) * 0.3
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1).squeeze(1)
    exact = functional.cross_entropy(hidden.bfloat16().float() @ weight.bfloat16().float().T, targets)
    got = next_token_loss(hidden.bfloat16(), weight.bfloat16(), targets)
    assert got.item() == pytest.approx(exact.item(), rel=1e-3)


def test_nothing_to_learn_gives_zero() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = next_token_loss(hidden, torch.randn(9, 8), torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
