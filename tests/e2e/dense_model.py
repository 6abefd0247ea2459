"""The built-in model as one plain forward over a whole text: no cache, no blocks, no batch, no server.

What the engine says about probabilities is held against this. (Against transformers: tests/training.)
"""

from __future__ import annotations

from functools import cache

import torch
from tests.e2e.serving import ASSETS
from torch import Tensor

from penstock.nn.doors import Batch
from penstock.training.card import load_exported
from penstock.training.dense import attention_for


@cache
def _model() -> torch.nn.Module:
    return load_exported(ASSETS).eval()


@torch.inference_mode()
def dense_logprobs(token_ids: list[int]) -> Tensor:
    """Row i: log probabilities of the token after `token_ids[: i + 1]`, float32 [S, V]."""
    model, num = _model(), len(token_ids)
    attention = attention_for(1, num, torch.device("cpu"))
    hidden = model(Batch(torch.tensor(token_ids), torch.arange(num), attention))
    return torch.log_softmax(model.logits(hidden).float(), -1)
