"""Float32 master weights behind a model of any dtype, and the optimisers that move them.

Knows parameters and gradients; no data, no schedule (it is given the factor on the learning rate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from penstock.training.recipe import LmRecipe


class MasterOptimizer:
    """Muon for the hidden matrices (or AdamW), AdamW for embeddings and norms, on float32 copies of the parameters.

    The model keeps its compute dtype; `step` reads its gradients, moves the masters and copies them back.
    Source of Muon: K. Jordan et al. 2024; scaled as in Liu et al. 2025, "Muon is Scalable for LLM Training", so that
    both optimisers take learning rates of one magnitude.
    """

    def __init__(self, model: nn.Module, recipe: LmRecipe) -> None:
        named = dict(model.named_parameters())
        self._model = list(named.values())
        self._names = list(named)
        self._masters = [nn.Parameter(p.detach().float().clone()) for p in self._model]
        self._grad_clip = recipe.grad_clip
        matrices = [m for m, name in zip(self._masters, named, strict=True) if m.ndim == 2 and "embed" not in name]
        embeds = [m for m, name in zip(self._masters, named, strict=True) if "embed" in name or "head" in name]
        vectors = [m for m in self._masters if m.ndim == 1]
        if recipe.optimizer == "muon":
            parts: list[torch.optim.Optimizer] = [
                torch.optim.Muon(
                    matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
                ),
            ]
            matrices = []
        else:
            parts = []
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": embeds, "weight_decay": recipe.weight_decay / 10},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        parts.append(torch.optim.AdamW(groups, lr=recipe.adamw_lr, betas=recipe.betas, eps=1e-10))
        self._parts = parts
        self._rates = [[g["lr"] for g in part.param_groups] for part in parts]

    @torch.no_grad()
    def step(self, lr_factor: float) -> float:
        """One update at `lr_factor` of the recipe's rates; clears the gradients. Returns their norm before clipping."""
        for master, parameter in zip(self._masters, self._model, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self._masters, self._grad_clip)
        for part, rates in zip(self._parts, self._rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * lr_factor
            part.step()
        self._copy_to_model()
        return float(norm)

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        for master, parameter in zip(self._masters, self._model, strict=True):
            parameter.copy_(master)

    def weights(self) -> dict[str, torch.Tensor]:
        """The float32 masters by the model's parameter names."""
        return {name: master.detach() for name, master in zip(self._names, self._masters, strict=True)}

    def state(self) -> dict[str, Any]:
        return {"masters": self.weights(), "parts": [part.state_dict() for part in self._parts]}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over a saved state, masters and moments, and bring the model's parameters in line."""
        for name, master in zip(self._names, self._masters, strict=True):
            master.copy_(state["masters"][name])
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._copy_to_model()
