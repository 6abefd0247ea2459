"""Model families, one file each. `MODELS`: architecture to class; `ROUTES`: class to the places of its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from penstock.config.model import ModelConfig
from penstock.nn.models import llama
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.create import allocate_model
from penstock.nn.weights.routes import Route

# Llama, Mistral, Qwen2 and Qwen3 differ only in what ModelConfig already says: biases, q/k norm, windows.
MODELS = {
    "LlamaForCausalLM": LlamaModel,
    "MistralForCausalLM": LlamaModel,
    "Qwen2ForCausalLM": LlamaModel,
    "Qwen3ForCausalLM": LlamaModel,
}
ROUTES: dict[type, Callable[[ModelConfig], list[Route]]] = {LlamaModel: llama.routes}


def build_model(config: ModelConfig, num_positions: int | None = None) -> LlamaModel:
    """A float32 model on the CPU with torch's default initialisation and gradients: where training starts."""
    return MODELS[config.architecture](config, num_positions)


def create_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    num_positions: int | None = None,
) -> LlamaModel:
    """A model for inference whose parameters are allocated and not yet filled: `load_weights` or `init_dummy` is next.

    Rotary tables are complete, for `num_positions` or all that the model has, and stay float32 whatever `dtype` is.
    """
    model = allocate_model(lambda: build_model(config, num_positions), dtype, device)
    assert isinstance(model, LlamaModel)
    return model


def model_routes(config: ModelConfig) -> list[Route]:
    """Where each tensor of a Hugging Face checkpoint of this architecture goes."""
    return ROUTES[MODELS[config.architecture]](config)
