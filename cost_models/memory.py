"""Bytes of one rank by cause: what stays (parameters, gradients, optimizer) and what a call needs.

The numbers are of the pipeline stage that needs most. Sequences have their mean length in a
micro-batch and room for the longest response in the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cost_models.calls import share
from cost_models.compute import ComputeCosts
from realloc.dataflow import Call, CallKind, Output
from realloc.experiment import Workload
from realloc.params import stage_layers
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


def activation_bytes(costs: ComputeCosts, tokens: float) -> float:
    """What one layer keeps of `tokens` tokens for its backward pass, without recomputation.

    Counted as in Korthikanti et al. (MLSys 2023, section 4.1) for fused attention and norms: the two
    residual inputs and the two norm outputs, q, k, v and the attention's output, its log-sum-exp in
    fp32, and the inputs of the MLP's activation, product and last projection.
    """
    shape = costs.shape
    q, kv = costs.heads * shape.head_dim, costs.kv_heads * shape.head_dim
    mlp = (4 if shape.gated_mlp else 2) * costs.ffn
    vectors = 4 * shape.hidden + 2 * q + 2 * kv + mlp
    return tokens * (vectors * costs.element_bytes + 4 * costs.heads)


def _stage_memory(
    costs: ComputeCosts, strategy: Strategy, workload: Workload, call: Call, stage: int
) -> CallMemory:
    elements = costs.stage_elements(strategy.pp, stage)
    layers = len(stage_layers(costs.shape, strategy.pp, stage))
    train = call.kind is CallKind.TRAIN_STEP
    if call.kind is CallKind.GENERATE:
        working = _generate_bytes(costs, strategy, workload, stage, layers)
    else:
        working = _pass_bytes(costs, strategy, workload, call, stage, layers)
    return CallMemory(
        parameters=elements * costs.element_bytes,
        gradients=elements * costs.element_bytes if train else 0,
        optimizer=optimizer_bytes(elements, costs.element_bytes) if train else 0,
        working={cause: int(size) for cause, size in working.items()},
    )


def _generate_bytes(
    costs: ComputeCosts, strategy: Strategy, workload: Workload, stage: int, layers: int
) -> dict[str, float]:
    shape = costs.shape
    sequences = share(workload.sequences, strategy.dp)
    groups = min(sequences, max(strategy.pp, strategy.micro_batches))
    group = sequences / groups
    slots = sequences * (workload.prompt.mean + workload.response.maximum)
    row = 2 * costs.kv_heads * shape.head_dim * costs.element_bytes
    # logits in fp32 and what sampling makes of them; the prefill keeps one layer at a time
    logits = 2 * 4 * group * shape.vocab if stage == strategy.pp - 1 else 0
    return {
        "kv_cache": slots * row * layers,
        "activations": activation_bytes(costs, group * workload.prompt.mean),
        "logits": logits,
    }


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
    # 1F1B: stage s holds the micro-batches that have not come back from the stages behind it
    in_flight = min(micro_batches, strategy.pp - stage)
    kept = layers * in_flight if train else 1
    working = {"activations": kept * activation_bytes(costs, tokens), "logits": 0.0}
    if stage == strategy.pp - 1 and costs.shape.head == "lm":
        rows = size * (1.0 if call.output is Output.SCORES else workload.response.mean)
        # fp32 logits; their gradient as well when training
        working["logits"] = (2 if train else 1) * 4 * rows * costs.vocab
    return working
