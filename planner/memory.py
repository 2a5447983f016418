"""Peak bytes per GPU of a whole plan.

On a GPU lie the parameters of every (role, layout) that it is part of, once each, the gradients and
optimizer state of every role it trains, and, while a call runs, that call's working set. Calls on
one GPU run one after the other, so only the largest working set counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.costs import Memory
from realloc.augmented import Placement
from realloc.dataflow import DataflowGraph


@dataclass(frozen=True)
class GpuMemory:
    """`by_cause` adds up to `total_bytes`; `call` has the largest working set on this GPU."""

    gpu: int
    total_bytes: int
    by_cause: Mapping[str, int]
    call: str


def worst_gpu(
    graph: DataflowGraph, placements: Mapping[str, Placement], memory: Mapping[str, Memory]
) -> GpuMemory:
    """The GPU that needs most. `memory[call]` is that call's at its placement.

    The first GPU of some call's mesh is always among the worst: the calls that cover any GPU all
    cover the last first GPU among them, and more calls never need less.
    """
    firsts = sorted({placement.mesh.first for placement in placements.values()})
    found = [gpu_memory(graph, placements, memory, gpu) for gpu in firsts]
    return max(found, key=lambda item: (item.total_bytes, -item.gpu))


def gpu_memory(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    memory: Mapping[str, Memory],
    gpu: int,
) -> GpuMemory:
    """Peak bytes of one GPU."""
    causes = {"parameters": 0, "gradients": 0, "optimizer": 0}
    held: set[object] = set()
    largest = -1
    working: Mapping[str, int] = {}
    name = ""
    for call in graph.calls:
        placement, needs = placements[call.name], memory[call.name]
        if gpu not in placement.mesh:
            continue
        key = (call.role, placement.layout_key) if call.role is not None else call.name
        if key not in held:
            held.add(key)
            causes["parameters"] += needs.parameters
        causes["gradients"] += needs.gradients
        causes["optimizer"] += needs.optimizer
        size = sum(needs.working.values())
        if size > largest:
            largest, working, name = size, needs.working, call.name
    for cause, size in working.items():
        causes[cause] = causes.get(cause, 0) + size
    return GpuMemory(gpu, sum(causes.values()), causes, name)


def causes_of(memory: Memory) -> dict[str, int]:
    """One call's bytes by cause, resident and working."""
    return {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        **memory.working,
    }
