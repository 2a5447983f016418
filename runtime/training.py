"""Gradients and the optimizer of one trainable role on one rank.

After a mini-batch gradients are summed over the ranks that hold replicas, clipped by the global
norm, and stepped by AdamW in fp32 (with fp32 master weights when the parameters are narrower).

What a rank keeps from its start to its end, in bytes, with N the elements of its compute boxes (its
tensor shard of its pipeline stage), R those of its rows of them (about N / dp), and p the bytes of
an element of the parameters; the optimizer takes 8 (both moments), 12 when p is not 4 (and masters):

    zero   parameters   gradients   optimizer
    0      p N          4 N         8 N or 12 N
    1      p N          4 N         8 R or 12 R
    2      p N          4 R         8 R or 12 R
    3      p R          4 R         8 R or 12 R

Beside that, within a train_step, U being the elements of a unit (embedding, a layer, final norm with
head): from 0 on with p < 4, the gradients of a layer or so in p bytes until they are added; from 1
on, staging of 4 (1 + 1 / dp) U for the largest U; from 2 on, the gradients of one unit as autograd
makes them, p U; under 3, the parameters of the unit at work, p U, and those of the head's unit (with
a tied embedding) from the end of the forward to that of the head's backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist

from realloc.errors import RunError
from realloc.experiment import OptimizerSpec
from realloc.layout import Box, compute_boxes, optimizer_boxes
from realloc.model_shape import ModelShape
from realloc.params import EMBED, parameters
from runtime.decoder import Decoder, reduce_partial_gradients
from runtime.optimizer import AdamW
from runtime.parallel import ParallelContext
from runtime.parameters import FlatParameters, allocate
from runtime.pipeline import MicroBatch, run_training
from runtime.tensor_parallel import add_rows
from runtime.zero import GatheredParameters, GradientSharder, Staging, exchanges, own_views

NORM_ELEMENTS = 1 << 12
"""Gradients whose norm is taken in fp32; the sum over more is one of fp64."""


class Trainer:
    """Owns the gradients and the AdamW state of one role's home layout on this rank."""

    def __init__(
        self,
        role: str,
        decoder: Decoder,
        params: FlatParameters,
        gathered: GatheredParameters | None,
        spec: OptimizerSpec,
        total_steps: int,
    ) -> None:
        """`params` is what the rank keeps: whole boxes, or its rows of them where `gathered` is given.

        `total_steps`: optimizer steps of the whole run, for the decay of the learning rate.
        """
        self._role, self._spec, self._decoder, self._params = role, spec, decoder, params
        context, shape = decoder.context, decoder.shape
        self._context, strategy = context, context.strategy
        boxes = compute_boxes(shape, strategy, context.at)
        own = optimizer_boxes(shape, strategy, context.at)
        self.optimizer_boxes: Mapping[str, Box] = own
        """The box of each parameter whose optimizer states this rank keeps."""
        self._gradients = allocate(own if strategy.zero >= 2 else boxes, torch.float32, context.device)
        self._gradients.flat.zero_()
        self._own_gradients = self._gradients.views
        stepped = params.views
        if strategy.zero == 1:
            self._own_gradients = own_views(boxes, own, self._gradients.views)
        if strategy.zero in (1, 2):
            stepped = own_views(boxes, own, params.views)
        self._stepped = stepped
        self._copies = _copies(shape, own, context)
        self.optimizer = AdamW(own, stepped, self._own_gradients, spec, total_steps, context.device)
        self._staging = gathered.staging if gathered else Staging(context.device)
        self._units = gathered.exchanges if gathered else {}
        if strategy.zero in (1, 2):
            self._units = exchanges(boxes, context, self._staging)
        leaves = gathered.params if gathered else params.views
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        self._sharder: GradientSharder | None = None
        if strategy.zero >= 2:
            release = gathered.release if gathered else None
            self._sharder = GradientSharder(self._units, leaves, self._own_gradients, release)
        else:
            _collect(leaves, self._gradients.views)
        self.serve(decoder)

    def serve(self, decoder: Decoder) -> None:
        """Has backward passes of a decoder of the same parameters put gradients where they belong.

        Past autograd where they can be added to what is there, instead of made whole and added.
        """
        if self._sharder is None:
            decoder.gradients = self._gradients.views
            if EMBED in decoder.gradients:
                decoder.embedding_rows = partial(add_rows, decoder.gradients[EMBED])
        elif self._context.strategy.pp == 1 and _embed_on_both_ends(decoder.shape):
            decoder.embedding_rows = self._sharder.add_rows

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

    @property
    def num_bytes(self) -> Mapping[str, int]:
        """What this rank keeps of `parameters`, `gradients` and `optimizer` states, in bytes."""
        return {
            "parameters": self._params.flat.nbytes,
            "gradients": self._gradients.flat.nbytes,
            "optimizer": sum(flat.nbytes for flat in self.optimizer.flat.values()),
        }

    @property
    def state_buffers(self) -> Mapping[str, tuple[torch.Tensor, ...]]:
        """The flat tensors behind `gradients` and `optimizer` of `num_bytes`."""
        return {"gradients": (self._gradients.flat,), "optimizer": tuple(self.optimizer.flat.values())}

    @property
    def equal_passes(self) -> bool:
        """Whether all replicas must run equally many micro-batches: those that communicate in each."""
        return self._context.strategy.zero >= 2

    def run(
        self, batches: Sequence[MicroBatch], loss: Callable[[torch.Tensor, MicroBatch], torch.Tensor]
    ) -> None:
        """Forward and backward of a mini-batch; see `runtime.pipeline.run_training`."""
        run_training(self._decoder, self._context, batches, loss)

    def zero_gradients(self) -> None:
        self._gradients.flat.zero_()

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
            scale = (self._spec.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in self.optimizer.gradients:
                gradient.mul_(scale)
        rate = self.optimizer.step()
        if self._context.strategy.zero in (1, 2):
            for unit in self._units.values():
                unit.gather(self._stepped, self._params.views)
        self._staging.release()
        return {"grad_norm": norm.item(), "learning_rate": rate}

    def reload_master(self) -> None:
        """Takes the parameters, newly loaded, as the master weights."""
        self.optimizer.reload_master()

    def _reduce(self) -> None:
        """Sums the gradients of what this rank steps over everything that holds a replica of it."""
        if self._sharder is not None:
            self._sharder.check()
        elif self._units:
            for unit in self._units.values():
                unit.reduce(self._gradients.views, self._own_gradients, accumulate=False)
        elif self._context.dp_group is not None:
            dist.all_reduce(self._gradients.flat, group=self._context.dp_group)
        reduce_partial_gradients(self._decoder, self._own_gradients)
        on_both_ends = self._context.ends_group is not None and _embed_on_both_ends(self._decoder.shape)
        if on_both_ends and EMBED in self._own_gradients:
            dist.all_reduce(self._own_gradients[EMBED], group=self._context.ends_group)

    def _global_norm(self) -> torch.Tensor:
        """Norm over the whole model: every element counted once, wherever it is replicated."""
        total = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for name, copies in self._copies.items():
            total += _square_sum(self._own_gradients[name].view(-1)) / copies
        if self._context.mesh_group is not None:
            dist.all_reduce(total, group=self._context.mesh_group)
        return total.sqrt().float()


def _square_sum(flat: torch.Tensor) -> torch.Tensor:
    """fp64 scalar; no fp64 copy is made of what may be a large matrix."""
    whole = flat.numel() - flat.numel() % NORM_ELEMENTS
    parts = (flat[:whole].view(-1, NORM_ELEMENTS), flat[None, whole:])
    norms = [torch.linalg.vector_norm(part, dim=1).double() for part in parts if part.numel()]
    return torch.cat(norms).square().sum() if norms else flat.new_zeros((), dtype=torch.float64)


def _collect(leaves: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
    """Has autograd add the leaves' gradients to `gradients`, in fp32."""
    for name, leaf in leaves.items():
        if leaf.dtype == torch.float32:
            leaf.grad = gradients[name]
        else:
            leaf.register_post_accumulate_grad_hook(_accumulate(gradients[name]))


def _accumulate(target: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Adds a narrow gradient to its fp32 buffer as soon as autograd has made it."""

    def hook(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            target.add_(parameter.grad)
            parameter.grad = None

    return hook


def _embed_on_both_ends(shape: ModelShape) -> bool:
    return shape.tied_embeddings and shape.head == "lm"


def _copies(shape: ModelShape, own: Mapping[str, Box], context: ParallelContext) -> Mapping[str, int]:
    """Parameter -> how many ranks of the mesh step each of the elements that this rank steps."""
    strategy = context.strategy
    copies = {}
    for spec in parameters(shape):
        if spec.name not in own:
            continue
        count = strategy.tp
        if spec.tp_dim is not None:
            units = spec.shape[spec.tp_dim] // spec.unit
            count = strategy.tp // units if spec.unit > 1 and units < strategy.tp else 1
        if spec.on_first and spec.on_last and strategy.pp > 1:
            count *= 2
        copies[spec.name] = count if strategy.zero else count * strategy.dp
    return copies
