"""Rotary position embeddings (arXiv 2104.09864), halves rotated against each other as in NeoX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import pi
from typing import Any

import torch

from realloc.model_shape import ModelShape
from runtime.parameters import beside


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


class _Rotate(torch.autograd.Function):
    """Rotates some [T, heads, dim] by the same angles; gradients turn the other way round."""

    @staticmethod
    def forward(
        ctx: Any, cos: torch.Tensor, signed_sin: torch.Tensor, *parts: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, signed_sin)
        return _rotated(parts, cos, signed_sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, signed_sin = ctx.saved_tensors
        return (None, None, *_rotated(grads, cos, signed_sin, sign=-1.0))


def _rotated(
    parts: Sequence[torch.Tensor], cos: torch.Tensor, signed_sin: torch.Tensor, sign: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """x cos + (x with its halves swapped) sin; parts that lie beside each other as one."""
    flat = beside([part.flatten(1) for part in parts])
    joined = parts if flat is None else [flat.view(flat.shape[0], -1, parts[0].shape[2])]
    half = cos.shape[-1] // 2
    turned = [torch.addcmul(x * cos, x.roll(half, -1), signed_sin, value=sign) for x in joined]
    if flat is None:
        return tuple(turned)
    return torch.split_with_sizes(turned[0], [part.shape[1] for part in parts], dim=1)


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

    def __call__(self, *parts: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rotates the first rotary_dim dimensions of each [T, heads, dim]."""
        if parts[0].shape[-1] > 2 * self._half:
            return [self._partly(part) for part in parts]
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            result: tuple[torch.Tensor, ...] = _Rotate.apply(*self._whole, *parts)  # type: ignore[no-untyped-call]
            return result
        return _rotated(parts, *self._whole)

    def _partly(self, x: torch.Tensor) -> torch.Tensor:
        half = self._half
        a, b = x[..., :half], x[..., half : 2 * half]
        parts = [a * self._cos - b * self._sin, b * self._cos + a * self._sin, x[..., 2 * half :]]
        return torch.cat(parts, dim=-1)
