"""Bytes of one rank by cause: what stays (parameters, gradients, optimizer) and what a call needs.

The numbers are of one pipeline stage, or of the one that needs most. Sequences have their mean length in a
micro-batch and room for the longest response in the KV cache. What lies in host memory (snapshots for
checkpoints, what is offloaded) is not counted, on CPUs neither; parameters that ranks of a CPU host read
from each other lie there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cost_models.activations import Phase, StagePass, forward_phases, training_phases
from cost_models.compute import GRADIENT_BYTES, ComputeCosts
from cost_models.packs import mixed_share, share
from cost_models.pipeline import most_in_flight
from cost_models.zero import resident_elements
from realloc.dataflow import Call, CallKind
from realloc.experiment import Workload
from realloc.reallocation import STAGING_BYTES
from realloc.strategy import Strategy


@dataclass(frozen=True)
class CallMemory:
    """Bytes of one rank for one call.

    `parameters`, `gradients` and `optimizer` are resident and belong to (role, layout): calls that
    share both share them. `working` lives only while the call runs, by cause.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    working: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def by_cause(self) -> Mapping[str, int]:
        resident = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
        }
        return {**resident, **self.working}

    @property
    def total(self) -> int:
        return sum(self.by_cause.values())


def call_memory(
    costs: ComputeCosts,
    strategy: Strategy,
    workload: Workload,
    call: Call,
    mixed: Workload | None = None,
    *,
    reallocates: bool = False,
    stage: int | None = None,
) -> CallMemory:
    """The memory of a stage; None: of the one that needs most of it. `mixed`: what train_steps mix in.

    `reallocates`: parameters may come here before the call, or leave after it, through staging buffers,
    which exist on a GPU while the call does not run.
    """
    stages = {0, strategy.pp // 2, strategy.pp - 1} if stage is None else {stage}
    memory = max(
        (_stage_memory(costs, strategy, workload, call, mixed, one) for one in sorted(stages)),
        key=lambda memory: memory.total,
    )
    staged = min(STAGING_BYTES, memory.parameters) if reallocates and not costs.is_cpu else 0
    if staged <= sum(memory.working.values()):
        return memory
    return replace(memory, working={"reallocation": staged})


def optimizer_bytes(elements: int, element_bytes: int) -> int:
    """AdamW: two fp32 moments, and an fp32 master copy of weights that are kept in 2 bytes."""
    return elements * (8 if element_bytes == 4 else 12)


def _stage_memory(
    costs: ComputeCosts,
    strategy: Strategy,
    workload: Workload,
    call: Call,
    mixed: Workload | None,
    stage: int,
) -> CallMemory:
    units = costs.stage_units(strategy.pp, stage, strategy.virtual_stages)
    elements = sum(units)
    layers = costs.num_layers_of(strategy.pp, strategy.virtual_stages)[stage]
    if call.kind is CallKind.GENERATE:
        working = _largest(_generation_phases(costs, strategy, workload, stage, layers))
        return CallMemory(elements * costs.element_bytes, working=working)
    at = _stage_pass(costs, strategy, workload, call, stage, layers, units)
    if call.kind is not CallKind.TRAIN_STEP:
        return CallMemory(elements * costs.element_bytes, working=_largest(forward_phases(at)))
    passes = [at] if mixed is None or call.mixture is None else _both_kinds(at, call, mixed, stage)
    own = resident_elements(elements, strategy)
    return CallMemory(
        parameters=own.parameters * costs.element_bytes,
        gradients=own.gradients * GRADIENT_BYTES,
        optimizer=optimizer_bytes(own.optimizer, costs.element_bytes),
        working=_largest(phase for one in passes for phase in training_phases(one)),
    )


def _largest(phases: Iterable[Phase]) -> Mapping[str, int]:
    """What lies there at the moment that needs most."""
    worst = max(phases, key=lambda phase: sum(phase.values()))
    return {cause: int(size) for cause, size in worst.items() if size}


def _stage_pass(
    costs: ComputeCosts,
    strategy: Strategy,
    workload: Workload,
    call: Call,
    stage: int,
    layers: int,
    units: tuple[int, ...],
) -> StagePass:
    """The largest micro-batch of the call, of sequences of mean length."""
    train = call.kind is CallKind.TRAIN_STEP
    sequences = share(call.num_sequences(workload.sequences), call.mini_batches if train else 1)
    sequences = share(sequences, strategy.dp)
    micro_batches = min(strategy.micro_batches, sequences)
    size = share(sequences, micro_batches)
    return StagePass(
        costs,
        strategy,
        tokens=size * (workload.prompt.mean + workload.response.mean),
        head_rows=size * workload.response.mean,
        layers=layers,
        is_first=stage == 0,
        is_last=stage == strategy.pp - 1,
        units=units,
        kept=most_in_flight(strategy, stage, micro_batches) if train else 0.0,
        micro_batches=micro_batches,
    )


def _both_kinds(own: StagePass, call: Call, mixed: Workload, stage: int) -> list[StagePass]:
    """The largest micro-batch of the batch, and that of what is mixed in, each among those held at once.

    A stage holds consecutive micro-batches, and all of one kind come before those of the other.
    """
    strategy = own.strategy
    sequences, count = mixed_share(call, mixed, strategy)
    size = share(sequences, count)
    other = replace(
        own,
        tokens=size * (mixed.prompt.mean + mixed.response.mean),
        head_rows=size * mixed.response.mean,
        micro_batches=count,
    )
    kinds = (own, other)
    held = most_in_flight(strategy, stage, int(own.micro_batches) + count)
    rows = sum(kind.micro_batches * kind.head_rows for kind in kinds)
    found = []
    for kind in kinds:
        beside = sorted(kinds, key=lambda one: one.tokens, reverse=True)
        tokens, left = min(held, 1.0) * kind.tokens, max(held - 1.0, 0.0)
        for one in beside:
            taken = min(left, one.micro_batches - (one is kind))
            tokens, left = tokens + taken * one.tokens, left - taken
        found.append(replace(kind, kept=tokens / kind.tokens, micro_batches=rows / kind.head_rows))
    return found


def _generation_phases(
    costs: ComputeCosts, strategy: Strategy, workload: Workload, stage: int, layers: int
) -> list[Phase]:
    """Prefill, and drawing tokens.

    As many lanes as there are stages have a cache; its slots hold the longest prompt's tokens.
    """
    shape = costs.shape
    sequences = share(workload.sequences, strategy.dp)
    groups = min(strategy.micro_batches, sequences)
    group = share(sequences, groups)
    slots = group * min(groups, strategy.pp)
    length = workload.prompt.maximum + workload.response.maximum - 1
    row = 2 * costs.kv_heads * shape.head_dim * costs.element_bytes
    samples = workload.samples_per_prompt
    # a prompt is kept apart from the slots while samples of it wait
    kept = workload.prompt.maximum if samples > 1 and groups > 1 else 0
    held = {"kv_cache": float((slots * length + kept) * row * layers)}
    packed = costs.packed_bytes(strategy.pp, stage, workload.response.maximum * groups)
    if packed:
        held["packed_weights"] = float(packed)
    tokens = max(1.0, group / samples) * workload.prompt.mean
    # the prompts' last rows alone get logits
    prefill = StagePass(costs, strategy, tokens, 0.0, layers, stage == 0, False)
    phases: list[Phase] = [held | dict(phase) for phase in forward_phases(prefill)]
    if stage == strategy.pp - 1:
        # in fp32, with their exponentials
        phases.append(held | {"logits": 2.0 * 4 * group * costs.vocab})
    return phases
