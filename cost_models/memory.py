"""Bytes of one rank by cause: what stays (parameters, gradients, optimizer) and what a call needs.

The numbers are of the pipeline stage that needs most. Sequences have their mean length in a
micro-batch and room for the longest response in the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cost_models.calls import share
from cost_models.compute import GRADIENT_BYTES, ComputeCosts
from cost_models.pipeline import most_in_flight
from cost_models.zero import resident_elements, staging_bytes
from realloc.dataflow import Call, CallKind
from realloc.experiment import Workload
from realloc.strategy import Recompute, Strategy

# What the runtime computes and keeps at a time (runtime.tensor_parallel), in elements.
LOGITS_CHUNK = 1 << 22
LOGITS_KEPT = 1 << 25


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


def call_memory(costs: ComputeCosts, strategy: Strategy, workload: Workload, call: Call) -> CallMemory:
    """The memory of the stage that needs most of it."""
    stages = {0, strategy.pp // 2, strategy.pp - 1}
    return max(
        (_stage_memory(costs, strategy, workload, call, stage) for stage in sorted(stages)),
        key=lambda memory: memory.total,
    )


def optimizer_bytes(elements: int, element_bytes: int) -> int:
    """AdamW: two fp32 moments, and an fp32 master copy of weights that are kept in 2 bytes."""
    return elements * (8 if element_bytes == 4 else 12)


def activation_bytes(
    costs: ComputeCosts,
    tokens: float,
    recompute: Recompute = Recompute.NONE,
    sequence_parallel: bool = False,
) -> float:
    """What one layer keeps of `tokens` tokens for its backward pass.

    Counted as in Korthikanti et al. (MLSys 2023, section 4.1) for fused attention and norms: the two
    residual inputs and the two norm outputs, q, k, v and the attention's output, its log-sum-exp in
    fp32, and the inputs of the MLP's activation, product and last projection. Selective recomputation
    keeps the residual inputs and the norm outputs (section 5 there), full recomputation the layer's
    input. Sequence parallelism splits what is kept outside the matrices over tp (section 4.2.2); the
    norm outputs are kept as gathered, all rows on each rank.
    """
    shape = costs.shape
    q, kv = costs.heads * shape.head_dim, costs.kv_heads * shape.head_dim
    rows = tokens / costs.tp if sequence_parallel else tokens
    residual = rows * shape.hidden * costs.element_bytes
    if recompute is Recompute.FULL:
        return residual
    outside = (2 + costs.norm_vectors) * residual + 2 * tokens * shape.hidden * costs.element_bytes
    if recompute is Recompute.SELECTIVE:
        return outside
    mlp = (4 if shape.gated_mlp else 2) * costs.ffn
    vectors = 2 * q + 2 * kv + mlp
    return outside + tokens * (vectors * costs.element_bytes + 4 * costs.heads)


def _stage_memory(
    costs: ComputeCosts, strategy: Strategy, workload: Workload, call: Call, stage: int
) -> CallMemory:
    units = costs.stage_units(strategy.pp, stage, strategy.virtual_stages)
    elements = sum(units)
    layers = costs.num_layers_of(strategy.pp, strategy.virtual_stages)[stage]
    if call.kind is CallKind.GENERATE:
        working = _generate_bytes(costs, strategy, workload, stage, layers)
        return CallMemory(elements * costs.element_bytes, working=_whole(working))
    working = _pass_bytes(costs, strategy, workload, call, stage, layers)
    if call.kind is not CallKind.TRAIN_STEP:
        return CallMemory(elements * costs.element_bytes, working=_whole(working))
    working["staging"] = float(staging_bytes(units, strategy, costs.element_bytes))
    own = resident_elements(elements, strategy)
    return CallMemory(
        parameters=own.parameters * costs.element_bytes,
        gradients=own.gradients * GRADIENT_BYTES,
        optimizer=optimizer_bytes(own.optimizer, costs.element_bytes),
        working=_whole(working),
    )


def _whole(sizes: Mapping[str, float]) -> Mapping[str, int]:
    return {cause: int(size) for cause, size in sizes.items()}


def _generate_bytes(
    costs: ComputeCosts, strategy: Strategy, workload: Workload, stage: int, layers: int
) -> dict[str, float]:
    """As many lanes as there are stages have a cache; its slots hold the longest prompt's tokens."""
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
    sizes = {
        "kv_cache": float((slots * length + kept) * row * layers),
        # the prefill keeps one layer's vectors at a time
        "activations": activation_bytes(costs, max(1.0, group / samples) * workload.prompt.mean),
        # logits in fp32 and their exponentials
        "logits": 2.0 * 4 * group * costs.vocab if stage == strategy.pp - 1 else 0.0,
    }
    packed = costs.packed_bytes(strategy.pp, stage, workload.response.maximum * groups)
    return sizes | ({"packed_weights": float(packed)} if packed else {})


def _pass_bytes(
    costs: ComputeCosts, strategy: Strategy, workload: Workload, call: Call, stage: int, layers: int
) -> dict[str, float]:
    sequences = workload.sequences
    train = call.kind is CallKind.TRAIN_STEP
    if train:
        sequences = share(sequences, call.mini_batches)
    sequences = share(sequences, strategy.dp)
    micro_batches = min(strategy.micro_batches, sequences)
    size = sequences / micro_batches
    tokens = size * (workload.prompt.mean + workload.response.mean)
    split = strategy.sequence_parallel
    # one layer's vectors exist in any pass: computed forward, or again on the way back
    activations = activation_bytes(costs, tokens, Recompute.NONE, split)
    if train:
        kept = layers * most_in_flight(strategy, stage, micro_batches)
        again = activations if strategy.recompute is not Recompute.NONE else 0.0
        activations = kept * activation_bytes(costs, tokens, strategy.recompute, split) + again
    working = {"activations": activations, "logits": 0.0}
    if stage == strategy.pp - 1 and costs.shape.head == "lm":
        working["logits"] = _logits_bytes(costs, size * workload.response.mean, train)
    return working


def _logits_bytes(costs: ComputeCosts, rows: float, train: bool) -> float:
    """fp32 logits come in chunks; all are kept for the backward pass where they are few enough."""
    logits = rows * costs.vocab
    chunk = min(logits, LOGITS_CHUNK)
    if not train:
        return 4 * chunk
    kept = logits if logits <= LOGITS_KEPT else chunk
    head_gradient = costs.vocab * costs.shape.hidden
    return 4 * (kept + chunk + head_gradient)
