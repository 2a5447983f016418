"""Rotary embeddings for decoding: the cosines and sines of all positions, made once per call.

The same numbers as `rope.Rotary`'s; a step only picks its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Rotate = Callable[[torch.Tensor], torch.Tensor]
"""[T, heads, dim] -> a new tensor, its first rotary dimensions turned by the tokens' positions."""


class RotaryTable:
    """`freqs` float32 [rotary_dim / 2]; positions up to `size`."""

    def __init__(self, freqs: torch.Tensor, size: int, dtype: torch.dtype) -> None:
        angles = torch.arange(size, dtype=torch.float32, device=freqs.device)[:, None] * freqs
        cos, sin = angles.cos(), angles.sin()
        self._rows = torch.cat([cos, cos, -sin, sin], -1).to(dtype)
        self._half = freqs.shape[0]

    def at(self, positions: torch.Tensor) -> Rotate:
        """positions int64 [T]."""
        half, width = self._half, 2 * self._half
        rows = self._rows.index_select(0, positions)[:, None]
        cos, signed_sin = rows[..., :width], rows[..., width:]

        def rotate(x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] == width:
                return torch.addcmul(x * cos, x.roll(half, -1), signed_sin)
            turned = x[..., :width]
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), signed_sin)
            return torch.cat([turned, x[..., width:]], -1)

        return rotate
