"""Attention without a cache: every forward sees whole sequences. What other attention must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.nn.doors import Batch


class DenseAttention:
    """Causal attention, windowed where the layer is, over sequences that stand one behind the other.

    sequence_ids and positions: int64 [T]; a token sees the earlier positions of its own sequence and itself.
    """

    def __init__(self, config: ModelConfig, sequence_ids: Tensor, positions: Tensor) -> None:
        distance = positions[:, None] - positions[None, :]
        same = sequence_ids[:, None] == sequence_ids[None, :]
        self.masks = [same & (distance >= 0) & (distance < (w or len(positions))) for w in config.layer_windows]

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * q.shape[-1] ** -0.5
        chances = scores.masked_fill(~self.masks[layer], -torch.inf).softmax(-1).to(q.dtype)
        return torch.einsum("hqk,khd->qhd", chances, v).reshape(q.shape[0], -1)


def dense_batch(config: ModelConfig, prompts: list[list[int]]) -> Batch:
    """A batch of whole prompts, each from position 0."""
    token_ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.tensor([n for prompt in prompts for n in range(len(prompt))])
    sequence_ids = torch.tensor([n for n, prompt in enumerate(prompts) for _ in prompt])
    return Batch(token_ids, positions, DenseAttention(config, sequence_ids, positions))


@torch.inference_mode()
def dense_logits(model: torch.nn.Module, prompts: list[list[int]]) -> Tensor:
    """float32 [T, vocab]: scores after every token of every prompt."""
    return model.logits(model(dense_batch(model.config, prompts)))
