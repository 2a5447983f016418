"""Peak bytes per GPU of a whole plan.

On a GPU lie the parameters of every (role, layout) that it is part of, once each, the gradients and
optimizer state of every role it trains, and, while a call runs, that call's working set. Calls on
one GPU run one after the other, so only the largest working set counts. What a plan offloads is on
the GPU from its load (or the reallocation that fills it) to its offload only, and counts at the
nodes between them in the plan's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.costs import Memory
from realloc.augmented import (
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    Placement,
    Residence,
    augment,
    residences,
)
from realloc.dataflow import DataflowGraph


@dataclass(frozen=True)
class GpuMemory:
    """`by_cause` adds up to `total_bytes`.

    `call` has the largest working set on this GPU; with offload it may also be a reallocation.
    """

    gpu: int
    total_bytes: int
    by_cause: Mapping[str, int]
    call: str


def worst_gpu(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    memory: Mapping[str, Memory],
    order: Sequence[str] | None = None,
    absent: Sequence[Residence] | None = None,
) -> GpuMemory:
    """The GPU that needs most. `memory[call]` is that call's at its placement.

    `order`: the nodes of an iteration; matters with offload alone, None takes the default order.
    `absent`: the `residences` of the placements, where they are known.
    The first GPU of some call's mesh is always among the worst: the calls that cover any GPU all
    cover the last first GPU among them, and more calls never need less.
    """
    absent = residences(graph, placements) if absent is None else absent
    if absent and order is None:
        order = augment(graph, placements).default_order()
    firsts = sorted({placement.mesh.first for placement in placements.values()})
    found = [_gpu_memory(graph, placements, memory, gpu, absent, order or ()) for gpu in firsts]
    return max(found, key=lambda item: (item.total_bytes, -item.gpu))


def gpu_memory(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    memory: Mapping[str, Memory],
    gpu: int,
    order: Sequence[str] | None = None,
) -> GpuMemory:
    """Peak bytes of one GPU; `order` as in `worst_gpu`."""
    absent = residences(graph, placements)
    if absent and order is None:
        order = augment(graph, placements).default_order()
    return _gpu_memory(graph, placements, memory, gpu, absent, order or ())


def held_at(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    memory: Mapping[str, Memory],
    gpu: int,
    order: Sequence[str],
    node: str,
) -> Mapping[str, int]:
    """Bytes by cause on one GPU while `node` of the order runs there."""
    absent = residences(graph, placements)
    here = [call.name for call in graph.calls if gpu in placements[call.name].mesh]
    passing = [item for item in absent if gpu in placements[item.call].mesh]
    position = {name: i for i, name in enumerate(order)}
    return _held(_always(graph, placements, memory, here, absent), passing, position, memory, node)


def _held(
    always: Mapping[str, int],
    passing: Sequence[Residence],
    position: Mapping[str, int],
    memory: Mapping[str, Memory],
    moment: str,
) -> dict[str, int]:
    """Bytes by cause while one node runs: what stays, what is there just then, what a call works with."""
    held = dict(always)
    for item in passing:
        if _is_present(position[item.first], position[item.last], position[moment]):
            for cause in item.causes:
                held[cause] += getattr(memory[item.call], cause)
    for cause, needed in memory[moment].working.items() if moment in memory else ():
        held[cause] = held.get(cause, 0) + needed
    return held


def _gpu_memory(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    memory: Mapping[str, Memory],
    gpu: int,
    absent: Sequence[Residence],
    order: Sequence[str],
) -> GpuMemory:
    """The moment of an iteration at which the GPU holds most: while a call runs or something fills."""
    here = [call for call in graph.calls if gpu in placements[call.name].mesh]
    causes = _always(graph, placements, memory, [call.name for call in here], absent)
    passing = [item for item in absent if gpu in placements[item.call].mesh]
    position = {name: i for i, name in enumerate(order)}
    moments = [call.name for call in here]
    moments += dict.fromkeys(item.first for item in passing if item.first not in moments)
    size, name, largest = -1, "", causes
    for moment in moments:
        held = _held(causes, passing, position, memory, moment)
        if sum(held.values()) > size:
            size, name, largest = sum(held.values()), moment, held
    return GpuMemory(gpu, sum(largest.values()), largest, name)


def _always(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    memory: Mapping[str, Memory],
    calls: Sequence[str],
    absent: Sequence[Residence],
) -> dict[str, int]:
    """Bytes by cause that stay all the time."""
    passing = {
        (item.role, placements[item.call].layout_key, cause) for item in absent for cause in item.causes
    }
    totals = {PARAMETERS: 0, GRADIENTS: 0, OPTIMIZER: 0}
    held: set[object] = set()
    for name in calls:
        role, needs = graph.by_name[name].role, memory[name]
        key = (role, placements[name].layout_key) if role is not None else name
        for cause, size in (
            (PARAMETERS, needs.parameters),
            (GRADIENTS, needs.gradients),
            (OPTIMIZER, needs.optimizer),
        ):
            if (role, placements[name].layout_key, cause) in passing:
                continue
            if cause != PARAMETERS or key not in held:
                totals[cause] += size
        held.add(key)
    return totals


def _is_present(first: int, last: int, at: int) -> bool:
    """Whether `at` lies from `first` to `last`, which may be around the end of the iteration."""
    return first <= at <= last if first <= last else at >= first or at <= last


def causes_of(memory: Memory) -> dict[str, int]:
    """One call's bytes by cause, resident and working."""
    return {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        **memory.working,
    }
