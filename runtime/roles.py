"""The models of a plan on one rank: parameters per layout, decoders, trainers.

Calls of one role whose placements have the same layout share one set of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from realloc.augmented import Placement, home_call
from realloc.backend import DEEPSPEED
from realloc.experiment import ModelSpec
from realloc.layout import compute_boxes, held_boxes
from realloc.model_shape import ModelShape
from realloc.plan import ExecutionPlan
from runtime.decoder import Decoder
from runtime.deepspeed_backend import DeepSpeedTrainer
from runtime.hf import load_boxes
from runtime.offload import RoleMemory, role_memory
from runtime.parallel import Groups, ParallelContext
from runtime.parameters import Allocator, FlatParameters, allocate, empty
from runtime.shared_memory import SharedMemory
from runtime.training import Trainer
from runtime.zero import GatheredParameters

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class RankModel:
    """One role in one layout on this rank."""

    params: FlatParameters
    """What the rank keeps: `held_boxes` of its layout."""
    decoder: Decoder
    gathered: GatheredParameters | None = None
    """What the decoder computes with, where that is more than the rank keeps (ZeRO 3)."""

    def in_context(self, context: ParallelContext) -> RankModel:
        """The same parameters with a decoder for another call."""
        decoder = self.decoder
        return replace(
            self, decoder=Decoder(decoder.shape, context, decoder.dtype, decoder.params, self.gathered)
        )


@dataclass
class RankRole:
    """One role on this rank: its models by the name of each call that this rank takes part in."""

    shape: ModelShape
    home: Placement
    by_call: dict[str, RankModel] = field(default_factory=dict)
    contexts: dict[str, ParallelContext] = field(default_factory=dict)
    trainer: Trainer | DeepSpeedTrainer | None = None
    memory: RoleMemory = field(default_factory=RoleMemory)
    """What of it comes to the device and leaves it again."""
    shared: SharedMemory | None = None
    """Where the parameters may lie, on CPUs: ranks of one host then reallocate without messages."""

    @property
    def home_model(self) -> RankModel | None:
        return next((self.by_call[name] for name in self._home_names()), None)

    def _home_names(self) -> list[str]:
        return [
            name
            for name, context in self.contexts.items()
            if Placement(context.mesh, context.strategy).layout_key == self.home.layout_key
        ]


def load_roles(plan: ExecutionPlan, groups: Groups, device: torch.device) -> dict[str, RankRole]:
    """Allocates and loads every layout of every role that this rank holds a part of.

    Raises InputError when a checkpoint does not match its shape.
    """
    graph, experiment = plan.graph, plan.experiment
    dtype = DTYPES[experiment.dtype]
    roles: dict[str, RankRole] = {}
    shared = SharedMemory() if device.type == "cpu" else None
    for name in graph.roles:
        spec = experiment.models[name]
        shape = experiment.role_shape(graph, name)
        role = RankRole(shape, plan.placements[home_call(graph, name).name], shared=shared)
        # memory that comes and goes cannot be shared; frozen parameters are never reallocated
        leaves = any(plan.placements[call.name].strategy.offload for call in graph.calls_of(name))
        moves = graph.trainer(name) is not None and not leaves
        allocator = shared.empty if shared is not None and moves else empty
        layouts: dict[object, RankModel] = {}
        for call in graph.calls_of(name):
            placement = plan.placements[call.name]
            context = groups.context(placement, device)
            if context is None:
                continue
            key = placement.layout_key
            if key not in layouts:
                trained = graph.trainer(name) is not None
                layouts[key] = _load(spec.model, shape, context, dtype, allocator, trained)
            # its own decoder: calls of one layout may differ in what the layout does not say
            role.by_call[call.name] = layouts[key].in_context(context)
            role.contexts[call.name] = context
        trainer = graph.trainer(name)
        if trainer is not None and trainer.name in role.by_call:
            steps = experiment.iterations * trainer.mini_batches * trainer.epochs
            if experiment.training_backend == DEEPSPEED:
                _train_with_deepspeed(name, role, trainer.name, spec, steps)
            else:
                model = role.by_call[trainer.name]
                role.trainer = Trainer(
                    name, model.decoder, model.params, model.gathered, spec.optimizer, steps
                )
        flat = {call: model.params.flat for call, model in role.by_call.items()}
        state = role.trainer.state_buffers if role.trainer is not None else {}
        role.memory = role_memory(graph, plan.placements, name, flat, state)
        roles[name] = role
    return roles


def _train_with_deepspeed(name: str, role: RankRole, call: str, spec: ModelSpec, steps: int) -> None:
    """Gives the role's train_step a trainer, and a decoder over the parameters that DeepSpeed holds."""
    model, context = role.by_call[call], role.contexts[call]
    boxes = compute_boxes(role.shape, context.strategy, context.at)
    weights = load_boxes(spec.model, role.shape, boxes, model.params.flat.dtype, context.device)
    trainer = DeepSpeedTrainer(name, role.shape, context, model.params, weights, spec.optimizer, steps)
    role.trainer = trainer
    role.by_call[call] = replace(model, decoder=trainer.decoder)


def _load(
    folder: str,
    shape: ModelShape,
    context: ParallelContext,
    dtype: torch.dtype,
    allocator: Allocator,
    trained: bool,
) -> RankModel:
    strategy, at = context.strategy, context.at
    boxes = held_boxes(shape, strategy, at)
    params = allocate(boxes, dtype, context.device, allocator)
    loaded = load_boxes(folder, shape, boxes, dtype, context.device, new_head=trained)
    with torch.no_grad():
        for name, view in params.views.items():
            view.copy_(loaded[name])
    if strategy.zero < 3:
        return RankModel(params, Decoder(shape, context, dtype, dict(params.views)))
    tied = shape.tied_embeddings and shape.head == "lm"
    gathered = GatheredParameters(compute_boxes(shape, strategy, at), params, context, tied=tied)
    return RankModel(params, Decoder(shape, context, dtype, gathered.params, gathered), gathered)
