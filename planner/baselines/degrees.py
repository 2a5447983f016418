"""Degrees of heuristic plans: what a rule such as 'tp within a node' means for a model and a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from realloc.cluster import Cluster
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.strategy import Strategy, forbidden


def all_gpus(cluster: Cluster) -> DeviceMesh:
    return DeviceMesh(0, cluster.num_gpus, cluster.gpus_per_node)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def split(shape: ModelShape | None, mesh: DeviceMesh, tp: int, pp: int = 1) -> Strategy:
    """At most `tp` and `pp` as the model and the mesh allow, replicas over the rest of the mesh."""
    if shape is None:  # no model: nothing to split
        return Strategy(dp=mesh.size)
    within = min(mesh.size, mesh.gpus_per_node)
    degrees = [d for d in divisors(within) if d <= tp and forbidden(Strategy(d, d, 1), shape) is None]
    tp = degrees[-1]
    stages = [d for d in divisors(mesh.size // tp) if d <= pp and d <= shape.num_layers]
    return Strategy(mesh.size // (tp * stages[-1]), tp, stages[-1])


def model_parallel(mesh: DeviceMesh) -> Iterator[tuple[int, int]]:
    """(tp, pp), ever more: tp up to a node, then pipeline stages over nodes.

    Narayanan et al., arXiv 2104.04473, section 5 (takeaways 1 and 2).
    """
    within = min(mesh.size, mesh.gpus_per_node)
    yield from ((tp, 1) for tp in divisors(within))
    yield from ((within, pp) for pp in divisors(mesh.size // within) if pp > 1)


def zero(strategy: Strategy, stage: int) -> Strategy:
    """ZeRO where there is something to split."""
    if strategy.dp == 1:
        return strategy
    return replace(strategy, zero=min(stage, 1) if strategy.pp > 1 else stage)
