"""A group of GPUs for each role: sizes by work, as meshes that are legal on the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cost_models.model import CostModel
from planner.baselines.degrees import divisors
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind
from realloc.mesh import DeviceMesh
from realloc.params import parameters

# forward and backward pass and, roughly, the optimizer; a decode step for each token costs as much as well
_WORK: Mapping[CallKind, float] = {
    CallKind.GENERATE: 4.0,
    CallKind.INFERENCE: 1.0,
    CallKind.TRAIN_STEP: 4.0,
    CallKind.COMPUTE: 0.0,
}


def role_groups(costs: CostModel, shared: bool) -> Mapping[str, DeviceMesh] | None:
    """Call -> mesh of its group. None when the cluster has fewer GPUs than there are groups.

    Generation has a group of its own. `shared`: frozen roles join trained ones, the first the first.
    """
    graph = costs.graph
    trained = [role for role in graph.roles if graph.trainer(role) is not None]
    frozen = [role for role in graph.roles if graph.trainer(role) is None]
    hosts = {role: trained[i % len(trained)] for i, role in enumerate(frozen)} if shared and trained else {}

    def group(call: Call) -> str:
        if call.kind is CallKind.GENERATE:
            return f"{call.role} generates"
        return hosts.get(str(call.role), str(call.role or graph.roles[0]))

    load: dict[str, float] = {}
    for call in graph.calls:
        size = 0.0 if call.role is None else sum(s.num_elements for s in parameters(costs.shape(call.role)))
        load[group(call)] = load.get(group(call), 0.0) + _WORK[call.kind] * call.epochs * size
    meshes = divided(costs.cluster, list(load.values()))
    if meshes is None:
        return None
    of_group = dict(zip(load, meshes, strict=True))
    return {call.name: of_group[group(call)] for call in graph.calls}


def divided(cluster: Cluster, loads: Sequence[float]) -> list[DeviceMesh] | None:
    """Disjoint meshes, the busiest group's grown again and again; None when there are too few GPUs."""
    per_node = cluster.gpus_per_node
    legal = divisors(per_node) + [per_node * n for n in range(2, cluster.num_nodes + 1)]
    sizes = [1] * len(loads)
    meshes = _placed(cluster, sizes)
    growing = meshes is not None
    while growing:
        growing = False
        for i in sorted(range(len(loads)), key=lambda i: -loads[i] / sizes[i]):
            at = legal.index(sizes[i]) + 1
            if at == len(legal):
                continue
            grown = [*sizes[:i], legal[at], *sizes[i + 1 :]]
            found = _placed(cluster, grown)
            if found is not None:
                sizes, meshes, growing = grown, found, True
                break
    return meshes


def _placed(cluster: Cluster, sizes: Sequence[int]) -> list[DeviceMesh] | None:
    """Meshes of these sizes one after the other, largest first, each where its size allows."""
    per_node = cluster.gpus_per_node
    found: dict[int, DeviceMesh] = {}
    free = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[i]
        start = free
        if size >= per_node:
            start = -(-free // per_node) * per_node
        else:
            node, gpu = divmod(free, per_node)
            gpu = -(-gpu // size) * size
            start = (node + 1) * per_node if gpu + size > per_node else node * per_node + gpu
        if start + size > cluster.num_gpus:
            return None
        found[i] = DeviceMesh(start, size, per_node)
        free = start + size
    return [found[i] for i in range(len(sizes))]
