"""Memory for a model's parameters, without paying for an initialisation that a load overwrites; and random weights.

Knows modules and parameters, no model family and no file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from penstock.nn.layers.embed import Embedding

M = TypeVar("M", bound=nn.Module)
_FILL_ELEMENTS = 1 << 22  # random numbers drawn at once: bounds the extra memory to 16 MiB
HEAD_STD = 3.0  # standard deviation of the logits of dummy weights, before tied embeddings add theirs
INNER_GAIN = 1.5  # of other projections: layers outweigh the embedding, attention has clear maxima


def allocate_model(build: Callable[[], M], dtype: torch.dtype, device: torch.device | str) -> M:
    """What `build` returns, with uninitialised parameters of `dtype` on `device`, for inference (no gradients).

    Tied parameters stay tied. Buffers are computed on the CPU by `build` (rotary tables: their code names the device)
    and keep their dtype. The contents are garbage until `load_weights` or `init_dummy` fills them.
    """
    with torch.device("meta"):
        model = build()
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in real:
                    empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                    real[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = real[id(parameter)]
        for name, buffer in module._buffers.items():
            assert buffer is None or not buffer.is_meta, f"buffer {name} was not computed on a device"
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


def init_dummy(model: nn.Module, seed: int) -> None:
    """Random weights of a size that makes the model worth testing: logits have a standard deviation of at least 2.

    A function of (seed, parameter name, shape) alone, so that every dtype and device gets the same values up to
    rounding. Scale vectors lie around 1, biases around 0; matrices are uniform with variance gain^2 / columns.
    """
    embeddings = {id(m.weight): m for m in model.modules() if isinstance(m, Embedding)}
    num_tokens = {m.weight.shape[0] for m in embeddings.values()}
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        centre, spread = 0.0, 0.25
        if parameter.dim() > 1:
            outer = id(parameter) in embeddings or parameter.shape[0] in num_tokens
            spread = (HEAD_STD if outer else INNER_GAIN) * math.sqrt(3 / parameter.shape[-1])
        elif name.endswith("weight"):
            centre = 1.0
        _fill_uniform(parameter.detach().view(-1), centre, spread, generator)


def _fill_uniform(flat: Tensor, centre: float, spread: float, generator: torch.Generator) -> None:
    for start in range(0, flat.numel(), _FILL_ELEMENTS):
        part = flat[start : start + _FILL_ELEMENTS]
        drawn = torch.empty(part.shape, dtype=torch.float32)
        part.copy_(drawn.uniform_(centre - spread, centre + spread, generator=generator))
