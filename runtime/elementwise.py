"""What a layer does between its products, with backward passes written by hand.

Autograd composes these of many small operators on CPUs, whose calls cost more than their arithmetic,
and keeps what they pass each other. Here each keeps its inputs alone (a norm one more number a row),
reads and writes as little as it can, and leaves the gradients of neighbours in neighbouring columns, so
that the product before them gets one matrix. Results equal the composed ones to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        result: torch.Tensor = (x * inverse).mul_(weight)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With r the inverse of the root mean square: dL/dx = r (g w - x r^2 mean(g w x))."""
        x, weight, inverse = ctx.saved_tensors
        grad, width = grads[0], x.shape[-1]
        both = (grad * x).reshape(-1, width)
        grad_x = None
        if ctx.needs_input_grad[0]:
            along = torch.mv(both, weight).view(inverse.shape)
            along.mul_(inverse).mul_(inverse).mul_(inverse).mul_(1.0 / width)
            grad_x = torch.mul(grad, weight).mul_(inverse).addcmul_(x, along, value=-1.0)
        grad_weight = torch.mv(both.t(), inverse.view(-1)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (arXiv 1910.07467)."""
    composed = x.device.type == "cpu" and x.dtype == torch.float32
    if not composed or not torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    result: torch.Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad, width = grads[0], gate.shape[1]
        both = grad.new_empty(gate.shape[0], 2 * width)
        grad_gate, grad_up = both[:, :width], both[:, width:]
        # the gate's columns hold what both steps need on the way
        torch.ops.aten.silu.out(gate, out=grad_gate)
        torch.mul(grad, grad_gate, out=grad_up)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, [T, width] each."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    result: torch.Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    return result
