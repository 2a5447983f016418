"""Matrix products of linear layers, through the faster of torch's CPU libraries.

torch sends float32 products on CPUs to MKL, which on AMD processors runs at less than half the
speed of oneDNN (1,024 x 288 x 768 on one core of an EPYC: 5.0 ms against 2.2 ms). oneDNN is only
reached through an operator that torch keeps for its compiler, so this module is the one place
that knows it; without that operator, for small products and on other devices it is plain torch.

A product's backward pass may put the weight's gradient off (`WeightGradients`): who runs it, and
when, is the pipeline's affair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
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


class WeightGradients:
    """Gradients of weights that backward passes leave for later, as closures.

    One backward pass is what is put off up to `close`; `run` does the oldest pass that waits. A
    closure holds the input and the output's gradient of one product, until it has run.
    """

    def __init__(self) -> None:
        self._open: list[Callable[[], None]] = []
        self._closed: deque[list[Callable[[], None]]] = deque()

    def add(self, closure: Callable[[], None]) -> None:
        self._open.append(closure)

    def close(self) -> None:
        """Ends a backward pass."""
        self._closed.append(self._open)
        self._open = []

    def run(self) -> None:
        """Computes the gradients of the oldest backward pass that has not been run."""
        closures = self._closed.popleft()
        while closures:  # each lets go of its tensors once it has run
            closures.pop(0)()

    @property
    def is_empty(self) -> bool:
        return not self._open and not self._closed


@dataclass(frozen=True)
class Backward:
    """What a product does for its backward pass beyond the plain thing.

    `later` takes the gradient of the weight. `only_keep` means that the backward pass is under
    way and repeats a forward pass for what it kept: the result itself is not needed, and is left
    uninitialised.
    """

    later: WeightGradients | None = None
    only_keep: bool = False


class _Linear(torch.autograd.Function):
    """`product` with its gradients, which are products of the same kind."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        product: Product,
        how: Backward | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.product = bias is not None, product
        # the leaf itself: a part that is computed again saves copies without history
        ctx.later = None if how is None or how.later is None else (how.later, weight)
        if how is not None and how.only_keep:
            return x.new_empty(x.shape[0], weight.shape[0])
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # oneDNN takes no broadcast gradients
        grad, product = grads[0].contiguous(), ctx.product
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.later is None:
                grad_weight = product(grad.t(), x.t(), None)
            else:
                later, leaf = ctx.later
                later.add(lambda: _add_gradient(leaf, product, grad, x))
        return (
            product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
            grad_weight,
            grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _add_gradient(weight: torch.Tensor, product: Product, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Adds grad^T @ x to the gradient of a leaf, by autograd, so that the leaf's hooks run."""
    with torch.no_grad():
        value = product(grad.t(), x.t(), None)
    torch.autograd.backward(weight, value)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, how: Backward | None = None
) -> torch.Tensor:
    """x [n, in] @ weight [out, in]^T + bias [out] -> [n, out], differentiable in all three."""
    product = _choose(x, weight)
    if not torch.is_grad_enabled() or (product is F.linear and how is None):
        return product(x, weight, bias)
    if not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return product(x, weight, bias)
    result: torch.Tensor = _Linear.apply(x, weight, bias, product, how)  # type: ignore[no-untyped-call]
    return result
