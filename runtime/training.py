"""Gradients and the optimizer of one trainable role on one rank.

Gradients live in one flat buffer beside the parameters. After a mini-batch they are summed over
the ranks that hold replicas, clipped by the global norm, and stepped by AdamW in fp32 (with fp32
master weights when the parameters are narrower).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from realloc.errors import RunError
from realloc.experiment import OptimizerSpec
from realloc.layout import Box
from realloc.model_shape import ModelShape
from realloc.params import EMBED, parameters
from runtime.decoder import Decoder, reduce_partial_gradients
from runtime.optimizer import AdamW
from runtime.parallel import ParallelContext
from runtime.parameters import FlatParameters, views_of


class Trainer:
    """Owns the gradient buffer and the AdamW state of one role's home layout on this rank."""

    def __init__(
        self,
        role: str,
        shape: ModelShape,
        decoder: Decoder,
        params: FlatParameters,
        context: ParallelContext,
        spec: OptimizerSpec,
        total_steps: int,
    ) -> None:
        """`total_steps`: optimizer steps of the whole run, for the decay of the learning rate."""
        self._role, self._context, self._spec, self._decoder = role, context, spec, decoder
        self._params = params
        self._gradient = torch.zeros_like(params.flat, dtype=torch.float32)
        self._gradient_views = views_of(self._gradient, params.boxes)
        self._weights = _norm_weights(shape, params, context)
        narrow = params.flat.dtype != torch.float32
        self.optimizer_boxes: Mapping[str, Box] = params.boxes
        """The box of each parameter whose optimizer states this rank keeps."""
        self.optimizer = AdamW(
            self.optimizer_boxes, params.views, self._gradient_views, spec, total_steps, context.device
        )
        for name, view in params.views.items():
            view.requires_grad_(True)
            if not narrow:
                view.grad = self._gradient_views[name]
            else:
                view.register_post_accumulate_grad_hook(_accumulate(self._gradient_views[name]))

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken."""
        return self.optimizer.num_steps

    def optimizer_state(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """State name -> parameter name -> fp32 tensor of the shape of `optimizer_boxes[parameter]`.

        The states are `exp_avg`, `exp_avg_sq`, and `master` with parameters narrower than fp32. The
        tensors are what the optimizer works on and stay in place: to load states, write into them
        and call `resume`.
        """
        return self.optimizer.states

    def resume(self, num_steps: int) -> None:
        """Continues after `num_steps` steps; `optimizer_state` and the parameters have been written."""
        self.optimizer.resume(num_steps)

    def zero_gradients(self) -> None:
        self._gradient.zero_()

    @torch.no_grad()
    def step(self) -> Mapping[str, float]:
        """Reduces, clips, steps; returns the gradient norm and the learning rate.

        Raises RunError when the norm is not finite: the parameters are then left as they were.
        """
        self._reduce()
        norm = self._global_norm()
        if not torch.isfinite(norm):
            raise RunError(
                f"role {self._role}: the gradient norm is {norm.item()} at optimizer step "
                f"{self.num_steps + 1}; lower its learning rate or look at the rewards."
            )
        if self._spec.clip_norm > 0:
            self._gradient.mul_((self._spec.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        rate = self.optimizer.step()
        return {"grad_norm": norm.item(), "learning_rate": rate}

    def reload_master(self) -> None:
        """Takes the parameters, newly loaded, as the master weights."""
        self.optimizer.reload_master()

    def _reduce(self) -> None:
        """Sums gradients over everything that holds a replica of a parameter."""
        reduce_partial_gradients(self._decoder, self._gradient_views)
        if self._context.ends_group is not None and _embed_on_both_ends(self._decoder.shape):
            dist.all_reduce(self._gradient_views[EMBED], group=self._context.ends_group)
        if self._context.dp_group is not None:
            dist.all_reduce(self._gradient, group=self._context.dp_group)

    def _global_norm(self) -> torch.Tensor:
        """Norm over the whole model: every element counted once, wherever it is replicated."""
        norms = [
            torch.linalg.vector_norm(self._gradient_views[name], dtype=torch.float64)
            for name in self._weights
        ]
        weights = torch.tensor(list(self._weights.values()), dtype=torch.float64, device=self._context.device)
        total = (torch.stack(norms).square() * weights).sum()
        if self._context.mesh_group is not None:
            dist.all_reduce(total, group=self._context.mesh_group)
            total /= self._context.strategy.dp
        return total.sqrt().float()


def _accumulate(target: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Adds a narrow gradient to its fp32 buffer as soon as autograd has made it."""

    def hook(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            target.add_(parameter.grad)
            parameter.grad = None

    return hook


def _embed_on_both_ends(shape: ModelShape) -> bool:
    return shape.tied_embeddings and shape.head == "lm"


def _norm_weights(shape: ModelShape, params: FlatParameters, context: ParallelContext) -> Mapping[str, float]:
    """Parameter -> 1 / (how many ranks of one replica hold each of its elements)."""
    tp = context.strategy.tp
    weights = {}
    for spec in parameters(shape):
        if spec.name not in params.boxes:
            continue
        copies = tp
        if spec.tp_dim is not None:
            units = spec.shape[spec.tp_dim] // spec.unit
            copies = tp // units if spec.unit > 1 and units < tp else 1
        on_both = spec.on_first and spec.on_last and context.strategy.pp > 1
        weights[spec.name] = 1.0 / (copies * (2 if on_both else 1))
    return weights
