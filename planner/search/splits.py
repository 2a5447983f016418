"""Starting points that split the cluster in two: some roles work on one part, the others on the rest.

Good plans often let two groups of roles work side by side, with the train_step of the larger model
on all GPUs. A walk hardly ever moves a whole group at once, so these are tried as starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from planner.problem import Choice, Problem
from realloc.cluster import Cluster
from realloc.dataflow import CallKind

MOST_ROLES = 6

Region = tuple[int, int]


def fastest_within(problem: Problem, regions: Sequence[Region]) -> Choice:
    """Each call at its fastest candidate inside its (first GPU, number of GPUs), memory aside.

    A call that has no candidate inside takes its fastest anywhere.
    """
    found = []
    for (first, size), rows in zip(regions, problem.rows, strict=True):
        inside = (i for i, row in enumerate(rows) if first <= row[1] and row[2] <= first + size)
        found.append(next(inside, 0))
    return tuple(found)


def best_splits(problem: Problem, number: int) -> list[Choice]:
    """The `number` splits that look best before anything is improved."""
    ranked = []
    for choice in dict.fromkeys(_splits(problem)):
        crowding = 1.0 + problem.overflow_bytes(choice) / problem.capacity_bytes
        ranked.append((problem.schedule(choice).period_s * crowding, choice))
    return [choice for _, choice in sorted(ranked)[:number]]


def _splits(problem: Problem) -> Iterator[Choice]:
    """Every two-way division of the roles, at every cut, with and without train_steps everywhere."""
    calls = problem.graph.calls
    groups = list(dict.fromkeys(call.role or call.name for call in calls))
    if not 2 <= len(groups) <= MOST_ROLES:
        return
    num_gpus = problem.cluster.num_gpus
    trained = [call.role for call in calls if call.kind is CallKind.TRAIN_STEP]
    for sides in product((0, 1), repeat=len(groups) - 1):
        side = dict(zip(groups, (0, *sides), strict=True))
        if not any(sides):
            continue
        for cut in _cuts(problem.cluster):
            parts = ((0, cut), (cut, num_gpus - cut))
            for everywhere in (None, *trained):
                yield fastest_within(
                    problem,
                    [
                        (0, num_gpus)
                        if call.kind is CallKind.TRAIN_STEP and call.role == everywhere
                        else parts[side[call.role or call.name]]
                        for call in calls
                    ],
                )


def _cuts(cluster: Cluster) -> list[int]:
    """Where to cut: between nodes (few places on a large cluster), or halves and quarters of one."""
    nodes, per_node = cluster.num_nodes, cluster.gpus_per_node
    if nodes == 1:
        return sorted({per_node * k // 4 for k in (1, 2, 3)} - {0})
    places = set(range(1, nodes))
    if nodes > 6:
        places = {1, 2, nodes // 4, nodes // 2, nodes * 3 // 4, nodes - 2, nodes - 1}
    return [per_node * place for place in sorted(places)]
