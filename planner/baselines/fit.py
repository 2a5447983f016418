"""Fits a heuristic plan to memory: the first step of its ladder in which every call finds room.

A step gives each call a few variants that differ in micro-batches and recomputation alone. Each call takes
its fastest; while a GPU overflows, the call that needs most there falls back to one that needs less. Other
savings (more model parallelism, offload) are further steps, because users take them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf

from cost_models.memory import CallMemory
from cost_models.model import CostModel
from planner.infeasible import describe_bytes, remedy
from planner.memory import GpuMemory, worst_gpu
from planner.options import gib
from realloc.augmented import Placement
from realloc.backend import untrainable
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind
from realloc.errors import InfeasibleError
from realloc.experiment import Experiment
from realloc.mesh import DeviceMesh
from realloc.strategy import Recompute, Strategy, forbidden

Step = Mapping[str, Sequence[Placement]]
"""Call -> its variants."""
MakeStep = Callable[[], Step]
"""Makes a step, or raises Cannot."""


class Cannot(Exception):
    """Why a step of a ladder is not possible; turned into an InfeasibleError when all are not."""


def variants(
    experiment: Experiment,
    costs: CostModel,
    call: Call,
    mesh: DeviceMesh,
    strategy: Strategy,
    recompute: Sequence[Recompute] = tuple(Recompute),
) -> list[Placement]:
    """The strategy with every number of micro-batches and, for a train_step, every way to recompute.

    Raises Cannot when the call cannot run so on that mesh.
    """
    sequences = call.num_sequences(experiment.workload.sequences) // call.mini_batches
    if strategy.size != mesh.size:
        raise Cannot(f"{call.name}: {strategy} does not fill the {mesh.size} GPUs of {mesh}")
    if strategy.dp > sequences:
        whole = "an iteration" if call.mini_batches == 1 else "a mini-batch"
        raise Cannot(f"{call.name}: dp {strategy.dp} exceeds the {sequences} sequences of {whole}")
    if call.role is not None and (why := forbidden(strategy, costs.shape(call.role))):
        raise Cannot(f"{call.name}: {strategy}: {why}")
    if call.kind is CallKind.COMPUTE:
        return [Placement(mesh, strategy)]
    most = sequences // strategy.dp
    numbers = sorted({1 << k for k in range(most.bit_length())} | {strategy.pp * k for k in (1, 2, 4)})
    found = [replace(strategy, micro_batches=m) for m in numbers if m <= most]
    if call.kind is CallKind.TRAIN_STEP:
        why = untrainable(experiment.training_backend, costs.cluster.num_gpus, mesh, strategy)
        if why is not None:
            raise Cannot(f"{call.name}: {why}")
        found = [replace(one, recompute=way) for one in found for way in recompute]
    return [Placement(mesh, one) for one in found]


def first_fit(
    name: str,
    experiment: Experiment,
    cluster: Cluster,
    costs: CostModel,
    ladder: Iterable[MakeStep],
) -> Mapping[str, Placement]:
    """The first step of the ladder that fits in memory. Raises InfeasibleError."""
    nearest: GpuMemory | None = None
    reasons: list[str] = []
    for make in ladder:
        try:
            step = make()
        except Cannot as reason:
            reasons.append(str(reason))
            continue
        found = _fitted(step, costs)
        if not isinstance(found, GpuMemory):
            return found
        if nearest is None or found.total_bytes < nearest.total_bytes:
            nearest = found
    where = f"{name} on {cluster}"
    if nearest is None:
        raise InfeasibleError(f"{where}: not possible: {reasons[0]}.")
    raise InfeasibleError(
        f"{where}: does not fit: the way that comes nearest needs {gib(nearest.total_bytes)} on GPU "
        f"{nearest.gpu} while {nearest.call} runs ({describe_bytes(nearest.by_cause)}), but only "
        f"{gib(costs.memory_bytes)} may be used; {remedy(nearest.by_cause)}."
    )


def _fitted(step: Step, costs: CostModel) -> Mapping[str, Placement] | GpuMemory:
    """Placements that fit, or the GPU that overflows by least."""
    calls = costs.graph.by_name
    left = {
        name: sorted(found, key=lambda p, call=calls[name]: costs.call_s(call, p))  # type: ignore[misc]
        for name, found in step.items()
    }
    while True:
        chosen = {name: found[0] for name, found in left.items()}
        memory: dict[str, CallMemory] = {
            name: costs.call_memory(calls[name], placement) for name, placement in chosen.items()
        }
        worst = worst_gpu(costs.graph, chosen, memory)
        if worst.total_bytes <= costs.memory_bytes:
            return chosen
        size = sum(memory[worst.call].working.values()) if worst.call in memory else -inf
        smaller = [
            placement
            for placement in left.get(worst.call, ())[1:]
            if sum(costs.call_memory(calls[worst.call], placement).working.values()) < size
        ]
        if not smaller:
            return worst
        left[worst.call] = smaller
