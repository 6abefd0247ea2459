"""Rotary position embedding, half-split form, with the scalings that checkpoints use.

Source: Su et al. 2021, "RoFormer"; "llama3" as in Meta's Llama 3.1 reference code; "yarn" from Peng et al. 2023.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from penstock.config.model import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2] angles per position, factor on cos and sin), on the CPU whatever the default device."""
    freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim))
    if scaling is None:
        return freqs, 1.0
    if scaling.kind == "linear":
        return freqs / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(freqs, scaling), 1.0
    return _yarn(freqs, head_dim, theta, scaling)


def _llama3(freqs: Tensor, s: RopeScaling) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, a linear ramp between."""
    wavelength = 2 * math.pi / freqs
    smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    ramp = (1 - smooth) * freqs / s.factor + smooth * freqs
    scaled = torch.where(wavelength > s.original_max_position / s.low_freq_factor, freqs / s.factor, ramp)
    return torch.where(wavelength < s.original_max_position / s.high_freq_factor, freqs, scaled)


def _yarn(freqs: Tensor, head_dim: int, theta: float, s: RopeScaling) -> tuple[Tensor, float]:
    def dim_of(rotations: float) -> float:
        return head_dim * math.log(s.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(s.beta_fast), dim_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)
    attention = s.attention_factor or (0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0)
    return freqs / s.factor * ramp + freqs * (1 - ramp), attention


class Rotary(nn.Module):
    """cos and sin tables for positions [0, max_position). `gather` once per step, `rotate` once per layer."""

    cos: Tensor  # float32 [max_position, head_dim / 2]: both halves of a head turn by the same angles
    sin: Tensor

    def __init__(self, head_dim: int, max_position: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        freqs, factor = inverse_frequencies(head_dim, theta, scaling)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device="cpu"), freqs)
        self.register_buffer("cos", angles.cos().mul_(factor), persistent=False)
        self.register_buffer("sin", angles.sin_().mul_(factor), persistent=False)

    def gather(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] to cos and sin [T, 1, head_dim] in `dtype`. The sign of rotate_half is folded into sin."""
        cos = self.cos[positions].unsqueeze(1)
        sin = self.sin[positions].unsqueeze(1)
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by tables from `Rotary.gather`; dtype of x."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
