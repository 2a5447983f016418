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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from runtime.parameters import adjacent, beside

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
    """`product` of one input with one weight, or with several that lie next to each other as one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        product: Product,
        how: Backward | None,
        into: Sequence[torch.Tensor] | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.has_bias, ctx.product, ctx.into = bias is not None, product, into
        # the leaves themselves: a part that is computed again saves copies without history
        ctx.later = None if how is None or how.later is None else (how.later, weights)
        whole = _whole(weights)
        if how is not None and how.only_keep:
            result = x.new_empty(x.shape[0], whole.shape[0])
        else:
            result = product(x, whole, bias)
        if len(weights) == 1:
            return result
        return torch.split_with_sizes(result, [weight.shape[0] for weight in weights], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        product, into = ctx.product, ctx.into
        # oneDNN takes no broadcast gradients
        grad = (grads[0] if len(grads) == 1 else _beside(grads)).contiguous()
        grad_weights: Sequence[torch.Tensor | None] = [None] * len(weights)
        if ctx.needs_input_grad[5]:
            if ctx.later is not None:
                later, leaves = ctx.later
                later.add(lambda: _add_gradient(leaves, product(grad.t(), x.t(), None), into))
            else:
                value = product(grad.t(), x.t(), None)
                if into is None:
                    grad_weights = _rows_of(value, weights)
                else:
                    _add(into, value)
        return (
            product(grad, _whole(weights).t(), None) if ctx.needs_input_grad[0] else None,
            grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            *grad_weights,
        )


def _whole(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    whole = adjacent(weights)
    assert whole is not None, "weights have moved"
    return whole


def _beside(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradients' columns side by side, without a copy where they lie so."""
    whole = beside(grads)
    return torch.cat(list(grads), dim=1) if whole is None else whole


def _rows_of(value: torch.Tensor, weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The rows of a gradient that belong to each weight."""
    return torch.split_with_sizes(value, [weight.shape[0] for weight in weights])


def _add(into: Sequence[torch.Tensor], value: torch.Tensor) -> None:
    whole = adjacent(into)
    if whole is not None:
        whole.add_(value)
        return
    for target, part in zip(into, _rows_of(value, into), strict=True):
        target.add_(part)


@torch.no_grad()
def _add_gradient(
    weights: Sequence[torch.Tensor], value: torch.Tensor, into: Sequence[torch.Tensor] | None
) -> None:
    """Adds a gradient to that of leaves: into its place, or by autograd, so that the leaves' hooks run."""
    if into is not None:
        _add(into, value)
        return
    torch.autograd.backward(weights, _rows_of(value, weights))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    how: Backward | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [n, in] @ weight [out, in]^T + bias [out] -> [n, out], differentiable in all three.

    `into` [out, in] is the memory of the weight's gradient: a backward pass may add to it directly.
    """
    product = _choose(x, weight)
    if not torch.is_grad_enabled() or (product is F.linear and how is None):
        return product(x, weight, bias)
    if not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return product(x, weight, bias)
    places = None if into is None else [into]
    result: torch.Tensor = _Linear.apply(x, bias, product, how, places, weight)  # type: ignore[no-untyped-call]
    return result


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    how: Backward | None = None,
    into: Sequence[torch.Tensor | None] | None = None,
) -> Sequence[torch.Tensor]:
    """`linear` of one input with several weights: one product where they follow each other in memory.

    The results may then be columns of one matrix.
    """
    places = into or [None] * len(weights)
    whole = adjacent(weights) if all(bias is None for bias in biases) else None
    product = F.linear if whole is None else _choose(x, whole)
    learns = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights))
    if whole is None or (learns and product is F.linear and how is None):
        each = zip(weights, biases, places, strict=True)
        return [linear(x, weight, bias, how, place) for weight, bias, place in each]
    if not learns:
        return torch.split_with_sizes(product(x, whole, None), [w.shape[0] for w in weights], dim=1)
    known = [place for place in places if place is not None]
    direct = known if len(known) == len(weights) else None
    result: Sequence[torch.Tensor] = _Linear.apply(x, None, product, how, direct, *weights)  # type: ignore[no-untyped-call]
    return (result,) if isinstance(result, torch.Tensor) else result
