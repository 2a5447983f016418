"""Will it fit, and how many GPUs are worth having: one search for each size of the cluster.

Decides which sizes are tried and where more GPUs stop paying. What a size allows is for search to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from planner.assess import Assessment
from planner.budget import budget
from realloc.cluster import Cluster
from realloc.errors import InfeasibleError, PlanError
from realloc.experiment import Experiment
from realloc.plan import ExecutionPlan

Search = Callable[[Experiment, Cluster], ExecutionPlan]
"""Finds a plan. Raises InfeasibleError when none fits."""
WORTH = 0.7
"""Of the GPUs that are added, this share must turn into speed for them to be worth it."""


@dataclass(frozen=True)
class Point:
    """One size of cluster. `assessment` is None where nothing fits, `why` then says by how much.

    `kept`: the number of GPUs of the smaller cluster whose plan this is, where the search on the larger
    one found nothing faster.
    """

    cluster: Cluster
    assessment: Assessment | None
    why: tuple[str, ...] = ()
    kept: int | None = None

    @property
    def num_gpus(self) -> int:
        return self.cluster.num_gpus

    @property
    def iteration_s(self) -> float | None:
        return None if self.assessment is None else self.assessment.iteration_s

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours for 1,000 samples (sequences)."""
        if self.assessment is None:
            return None
        sequences = self.assessment.plan.experiment.workload.sequences
        return self.assessment.iteration_s * self.num_gpus / 3600 * 1000 / sequences


@dataclass(frozen=True)
class Fit:
    """`points` by size. `least`: the smallest cluster on which a plan fits, among all whole numbers of
    nodes and slices of one. `knee`: the largest size up to which added GPUs were worth it."""

    points: tuple[Point, ...]
    least: Point | None
    knee: Point | None

    def efficiency(self, point: Point) -> float | None:
        """Speed gained over GPUs added since the size before; None at the first that fits."""
        fitting = [p for p in self.points if p.iteration_s is not None]
        if point not in fitting or point is fitting[0]:
            return None
        return _efficiency(fitting[fitting.index(point) - 1], point)


def _efficiency(before: Point, after: Point) -> float:
    assert before.iteration_s is not None
    assert after.iteration_s is not None
    speed = before.iteration_s / after.iteration_s - 1
    return speed / (after.num_gpus / before.num_gpus - 1)


def sizes(cluster: Cluster, max_gpus: int) -> tuple[Cluster, ...]:
    """Slices of a node whose size divides it, then 1, 2, 4, ... nodes and the most that are allowed."""
    node = cluster.gpus_per_node
    found = [
        replace(cluster, num_nodes=1, gpus_per_node=size)
        for size in range(1, node)
        if node % size == 0 and size <= max_gpus
    ]
    most = max_gpus // node
    counts = {1 << k for k in range(most.bit_length()) if 1 << k <= most} | ({most} if most else set())
    return (*found, *(replace(cluster, num_nodes=count) for count in sorted(counts)))


def fit(experiment: Experiment, cluster: Cluster, max_gpus: int, search: Search) -> Fit:
    """Searches a plan for every size, then narrows down the least number of nodes that will do."""
    points: list[Point] = []
    for size in sizes(cluster, max_gpus):
        before = next((p for p in reversed(points) if p.assessment is not None), None)
        points.append(_point(experiment, size, before, search))
    points = _narrowed(experiment, points, search)
    least = next((point for point in points if point.assessment is not None), None)
    return Fit(tuple(points), least, _knee(points))


def _point(experiment: Experiment, cluster: Cluster, before: Point | None, search: Search) -> Point:
    """The plan for one size; that of the size before, on its first GPUs, where it is no slower."""
    try:
        found = Assessment(search(experiment, cluster))
    except (InfeasibleError, PlanError) as error:  # no plan, or a constraint names GPUs that are not there
        return Point(cluster, None, (str(error),))
    kept = None
    if before is not None and before.assessment is not None:
        smaller = _on_first_gpus(before.assessment.plan, cluster)
        if smaller is not None and smaller.iteration_s <= found.iteration_s:
            found, kept = smaller, before.kept or before.num_gpus
    if before is None or before.assessment is None:
        return Point(cluster, found, (), kept)
    point = Point(cluster, found, (), kept)
    if _efficiency(before, point) < WORTH:
        return replace(point, why=_losses(before.assessment, found))
    return point


def _on_first_gpus(plan: ExecutionPlan, cluster: Cluster) -> Assessment | None:
    """A smaller cluster's plan on the first GPUs of a larger one; None where its meshes are none there."""
    node = cluster.gpus_per_node
    if node % plan.cluster.gpus_per_node:
        return None
    placements = {
        name: replace(p, mesh=replace(p.mesh, gpus_per_node=node)) for name, p in plan.placements.items()
    }
    return Assessment(replace(plan, cluster=cluster, placements=placements))


def _losses(before: Assessment, after: Assessment) -> tuple[str, ...]:
    """What kept more GPUs from being as much faster: causes that take more GPU-seconds than before."""
    gpus_before, gpus_after = before.plan.cluster.num_gpus, after.plan.cluster.num_gpus
    old = {cause: spent * gpus_before for cause, spent in budget(before).items()}
    new = {cause: spent * gpus_after for cause, spent in budget(after).items()}
    growth = {cause: spent - old.get(cause, 0.0) for cause, spent in new.items()}
    total = sum(grown for grown in growth.values() if grown > 0)
    found = []
    for cause, grown in sorted(growth.items(), key=lambda item: -item[1])[:3]:
        if grown <= 0 or grown < 0.15 * total:
            break
        if cause.kind == "idle":
            found.append(f"GPUs idle {after.idle_share:.0%} of the time ({before.idle_share:.0%} before)")
        elif old.get(cause, 0.0) < 0.02 * new[cause]:
            found.append(
                f"{cause.name} is new: {new[cause] / (after.iteration_s * gpus_after):.0%} of the time"
            )
        else:
            found.append(f"{cause.name} takes {new[cause] / old[cause]:.2g} times the GPU-seconds")
    return tuple(found)


def _narrowed(experiment: Experiment, points: list[Point], search: Search) -> list[Point]:
    """Halves the gap between the last number of nodes that is too few and the first that will do."""
    first = next((i for i, point in enumerate(points) if point.assessment is not None), None)
    if first is None or first == 0:
        return points
    low, high = points[first - 1].cluster, points[first].cluster
    if low.gpus_per_node != high.gpus_per_node:
        return points
    too_few, enough = low.num_nodes, high.num_nodes
    more: list[Point] = []
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        point = _point(experiment, replace(high, num_nodes=middle), None, search)
        more.append(point)
        if point.assessment is None:
            too_few = middle
        else:
            enough = middle
    return sorted([*points, *more], key=lambda point: point.num_gpus)


def _knee(points: Sequence[Point]) -> Point | None:
    """The last size before the first at which added GPUs were not worth it; None where nothing fits."""
    fitting = [point for point in points if point.iteration_s is not None]
    for before, after in pairwise(fitting):
        if _efficiency(before, after) < WORTH:
            return before
    return fitting[-1] if fitting else None
