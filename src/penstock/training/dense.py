"""Causal attention over whole rows, and next-token loss in pieces: the two parts where training differs from serving.

Knows tensors and shapes; no recipe, no optimiser, no cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Up to this row length plain matrix products with a materialised [S, S] score beat the CPU's fused kernel, whose
# backward runs at about 150 of 400 GFLOP/s: 3,950 against 3,120 tokens/s at S = 256 for penstock-tiny on 2 cores.
MAX_MATERIALISED = 1024


class DenseCausalAttention:
    """`PreparedAttention` over B rows of S tokens that lie one behind the other; every row sees only itself.

    No cache: keys and values are those of this forward. Gradients flow through `run`.
    """

    def __init__(self, num_rows: int, seq_len: int, mask: Tensor | None) -> None:
        """mask: bool [S, S], True above the diagonal, to use plain products; None to use torch's fused attention."""
        self.num_rows, self.seq_len, self.mask = num_rows, seq_len, mask

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B * S, Hq, D], k and v [B * S, Hkv, D]; result [B * S, Hq * D]."""
        rows, seq_len, head_dim = self.num_rows, self.seq_len, q.shape[-1]
        q, k, v = (t.view(rows, seq_len, -1, head_dim).transpose(1, 2) for t in (q, k, v))
        if self.mask is None:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            group = q.shape[1] // k.shape[1]
            q = q.reshape(-1, group * seq_len, head_dim)
            k, v = k.reshape(-1, seq_len, head_dim), v.reshape(-1, seq_len, head_dim)
            scores = torch.bmm(q, k.transpose(1, 2)).view(-1, group, seq_len, seq_len) * head_dim**-0.5
            probs = scores.masked_fill(self.mask, float("-inf")).softmax(-1)
            out = torch.bmm(probs.view(-1, group * seq_len, seq_len), v).view(rows, -1, seq_len, head_dim)
        return out.transpose(1, 2).reshape(rows * seq_len, -1)


def attention_for(num_rows: int, seq_len: int, device: torch.device) -> DenseCausalAttention:
    """The faster of the two forms for this row length and device."""
    if device.type != "cpu" or seq_len > MAX_MATERIALISED:
        return DenseCausalAttention(num_rows, seq_len, None)
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).triu(1)
    return DenseCausalAttention(num_rows, seq_len, mask)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of rows, so that [N, vocab] never exists as a whole.

    Source of the idea: Hsu et al. 2024, "Liger Kernel" (fused linear cross entropy).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        num_targets = (targets >= 0).sum().clamp_min(1)
        wanted = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            h, t = hidden[start : start + chunk], targets[start : start + chunk]
            learned = t >= 0
            index = t.clamp_min(0).unsqueeze(1)
            probs = torch.softmax(h @ weight.T, -1)
            # bfloat16 has the range of float32: the clamp only meets probabilities that underflow both
            chosen = probs.gather(1, index)
            total -= (chosen.float().clamp_min(1e-37).log().squeeze(1) * learned).sum()
            if not wanted:
                continue
            grad = probs.scatter_(1, index, chosen - 1).mul_((learned / num_targets).to(probs.dtype).unsqueeze(1))
            grad_hidden[start : start + chunk] = grad @ weight
            grad_weight += (grad.T @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / num_targets

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return grad_hidden * scale, (grad_weight * scale).to(grad_hidden.dtype), None, None


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Mean cross entropy in nats over the targets >= 0, float32 scalar, differentiable.

    hidden [N, hidden] and weight [vocab, hidden] of one dtype, in which products and softmax run; targets int64 [N].
    bfloat16 softmax costs a third of the float32 one here and moves the mean loss by less than 1e-3 (tested).
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
    return loss
