"""A trained model as a Hugging Face directory: config, generation config, safetensors, tokenizer, chat template.

Knows HF's names and `routes`; knows nothing of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from penstock.config.model import parse_model_config
from penstock.nn.models.llama import routes
from penstock.training.recipe import LmRecipe
from penstock.training.tokenizer import END_OF_TEXT, IM_END, write_tokenizer


def config_json(recipe: LmRecipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """The recipe's model table as config.json, with the token ids of its tokenizer."""
    return {
        **recipe.model,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def checkpoint_tensors(recipe: LmRecipe, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Our fused parameters as the tensors that Hugging Face names, contiguous, in `dtype`."""
    found = {}
    for route in routes(parse_model_config(recipe.model)):
        if route.kind != "fill":  # a tied head is stored once, as the embedding
            continue
        tensor = weights[route.target]
        tensor = tensor if route.rows is None else tensor[route.rows[0] : route.rows[1]]
        found[route.source] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return found


def export_model(recipe: LmRecipe, weights: dict[str, Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """Write a complete model directory in bfloat16. `weights`: by the parameter names of our model, any float dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, directory, int(recipe.model["max_position_embeddings"]))
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "eos_token_id": [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)],
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
    }
    for name, content in (("config.json", config_json(recipe, tokenizer)), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    fresh = directory / "model.safetensors.part"
    save_file(checkpoint_tensors(recipe, weights, torch.bfloat16), fresh, metadata={"format": "pt"})
    fresh.chmod(0o644)
    fresh.replace(directory / "model.safetensors")  # readers see the old weights or the new, never half of them
