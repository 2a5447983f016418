"""Matrix products of linear layers, through the faster of torch's CPU libraries.

torch sends float32 products on CPUs to MKL, which on AMD processors runs at less than half the
speed of oneDNN (1,024 x 288 x 768 on one core of an EPYC: 5.0 ms against 2.2 ms). oneDNN is only
reached through an operator that torch keeps for its compiler, so this module is the one place
that knows it; without that operator, for small products and on other devices it is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

SMALL = 1 << 20
"""Multiply-adds up to which MKL's lower call overhead wins."""

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@lru_cache(maxsize=1)
def _onednn() -> Product | None:
    """x [n, in], weight [out, in], bias -> [n, out] by oneDNN; None where torch lacks it."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or not torch.backends.mkldnn.is_available():
        return None
    overload = operator.default

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = overload(x, weight, bias, "none", [], "")
        return result

    return product


def _choose(x: torch.Tensor, weight: torch.Tensor) -> Product:
    suits = x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2
    if suits and x.shape[0] * weight.shape[0] * weight.shape[1] > SMALL:
        return _onednn() or F.linear
    return F.linear


class _Linear(torch.autograd.Function):
    """`product` with its gradients, which are products of the same kind."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product: Product
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.product = bias is not None, product
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # oneDNN takes no broadcast gradients
        grad, product = grads[0].contiguous(), ctx.product
        return (
            product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
            product(grad.t(), x.t(), None) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
            None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, in] @ weight [out, in]^T + bias [out] -> [n, out], differentiable in all three."""
    product = _choose(x, weight)
    if product is F.linear or not torch.is_grad_enabled():
        return product(x, weight, bias)
    if not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return product(x, weight, bias)
    result: torch.Tensor = _Linear.apply(x, weight, bias, product)  # type: ignore[no-untyped-call]
    return result
