"""Rotary position embeddings (arXiv 2104.09864), halves rotated against each other as in NeoX."""

from __future__ import annotations

from functools import cached_property
from math import pi

import torch

from realloc.model_shape import ModelShape


def inverse_frequencies(shape: ModelShape) -> torch.Tensor:
    """float32 [rotary_dim / 2]: radians per position of each rotated pair.

    With `rope_scaling`, frequencies are divided by its factor: all of them (linear), or, as
    published with Llama 3.1, those whose wavelength exceeds original_positions / low_freq_factor,
    and smoothly fewer up to original_positions / high_freq_factor.
    """
    exponents = torch.arange(0, shape.rotary_dim, 2, dtype=torch.float32) / shape.rotary_dim
    freqs = 1.0 / (shape.rope_theta**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return freqs
    if not scaling.original_positions:
        return freqs / scaling.factor
    turns = scaling.original_positions * freqs / (2 * pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    unscaled = ((turns - scaling.low_freq_factor) / width).clamp(0.0, 1.0)
    return unscaled * freqs + (1.0 - unscaled) * freqs / scaling.factor


class Rotary:
    """Cosines and sines of a batch of positions, made once and used by all layers."""

    def __init__(self, freqs: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> None:
        """freqs [rotary_dim / 2] float32, positions [T]."""
        angles = positions.to(torch.float32)[:, None] * freqs
        self._cos = angles.cos().to(dtype)[:, None]
        self._sin = angles.sin().to(dtype)[:, None]
        self._half = freqs.shape[0]

    @cached_property
    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines of all dimensions; their sines, negative for the first half."""
        return torch.cat([self._cos, self._cos], -1), torch.cat([-self._sin, self._sin], -1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates the first rotary_dim dimensions of x [T, heads, dim].

        Without gradients three operators do what seven do with them; results agree to rounding.
        """
        half, dim = self._half, x.shape[-1]
        if dim == 2 * half and not torch.is_grad_enabled():
            cos, signed_sin = self._whole
            return torch.addcmul(x * cos, x.roll(half, -1), signed_sin)
        a, b = x[..., :half], x[..., half : 2 * half]
        parts = [a * self._cos - b * self._sin, b * self._cos + a * self._sin]
        if dim > 2 * half:
            parts.append(x[..., 2 * half :])
        return torch.cat(parts, dim=-1)
