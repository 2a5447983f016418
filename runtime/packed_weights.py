"""Weights made ready for many products with few rows, as decoding needs them.

Decides when matrices that read the same input become one, without a copy where they already lie
next to each other, and when a second copy in oneDNN's own order pays (float32 on CPUs: reading a
[32000, 288] matrix for 16 rows takes 2.1 ms against 8.3 ms as it lies). Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from runtime.linear import linear
from runtime.parameters import adjacent

FEW_PRODUCTS = 8
"""Up to this many steps, packing costs more than it saves."""
SMALL = 1 << 19
"""Multiply-adds up to which the plain product's lower call overhead wins."""
LARGE = 1 << 17
"""Elements from which a packed product of even one row wins: they come from memory, which a plain product
reads no faster. (Layers of a 15M Llama, whose head lies between two steps: 0.29 ms against 0.43 ms.)"""
MAX_OUTPUT_BYTES = 1 << 20
"""Larger results come in parts: the allocator maps and clears big blocks anew each time."""


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN's packed products exist for tensors like this one."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not _has_operators():
        return False
    return weight.numel() > SMALL // 32


def _has_operators() -> bool:
    operators = torch.ops.mkldnn
    known = all(hasattr(operators, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    return known and torch.backends.mkldnn.is_available()


class ReadyWeight:
    """One weight [out, in], or several of equal width as one, ready for products.

    `pack` makes the second copy. The weight must not change while this lives.
    """

    def __init__(self, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], *, pack: bool):
        """`biases` has one entry for each part."""
        whole = adjacent(parts)
        self._bias = _joined_bias(parts, biases)
        self._plain = list(zip(parts, biases, strict=True)) if whole is None else [(whole, self._bias)]
        # products of few rows, their weights turned beforehand
        self._few_rows = SMALL // sum(part.numel() for part in parts)
        self._turned = None
        if whole is not None and self._bias is None and whole.device.type == "cpu":
            self._turned = whole.t()
        self._packed: list[Any] = []
        if pack:
            joined = torch.cat(list(parts)) if whole is None else whole
            if can_pack(joined):
                self._packed = _pack(joined)
                self._few_rows *= joined.numel() < LARGE

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, in] -> [n, out of all parts]."""
        if x.shape[0] > self._few_rows:
            if self._packed:
                return _packed_product(x, self._packed, self._bias)
            products = [linear(x, weight, bias) for weight, bias in self._plain]
        elif self._turned is not None:
            return torch.mm(x, self._turned)
        else:
            products = [F.linear(x, weight, bias) for weight, bias in self._plain]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def add_product(self, target: torch.Tensor, x: torch.Tensor) -> bool:
        """target [n, out] += the product of x [n, in], if one operator does it; returns whether."""
        if x.shape[0] > self._few_rows or self._turned is None:
            return False
        target.addmm_(x, self._turned)
        return True


def _joined_bias(parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [p.new_zeros(p.shape[0]) if b is None else b for p, b in zip(parts, biases, strict=True)]
    )


def _pack(weight: torch.Tensor) -> list[Any]:
    """The packed parts of a weight, for about 16 rows (more or fewer work as well)."""
    parts = -(-weight.shape[0] * 16 * weight.element_size() // MAX_OUTPUT_BYTES)
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return [reorder(part, 16) for part in weight.detach().chunk(parts)]


def _packed_product(x: torch.Tensor, packed: Sequence[Any], bias: torch.Tensor | None) -> torch.Tensor:
    product = torch.ops.mkldnn._linear_pointwise.default
    if len(packed) == 1:
        result: torch.Tensor = product(x, packed[0], bias, "none", [], "")
        return result
    parts = [product(x, part, None, "none", [], "") for part in packed]
    result = torch.cat(parts, dim=1)
    return result if bias is None else result.add_(bias)
