"""Nodes of any number of GPUs: plans are legal, and as good as the tables say."""

from __future__ import annotations

from typing import Any

import pytest

from planner.search import methods
from planner.search.mcmc import mcmc
from planner.search.space import Spaces
from realloc.cluster import Cluster
from realloc.mesh import all_meshes
from tests.unit.planner.problems import make_problem, short_graph

LONG_S = 600.0


@pytest.mark.parametrize(("nodes", "per_node"), [(4, 1), (2, 2), (2, 4), (2, 6), (2, 8), (1, 16)])
def test_search_proves_plans_on_nodes_of_any_size(nodes, per_node):
    cluster = Cluster(nodes, per_node, "x")
    problem = make_problem(short_graph(), cluster, nodes + per_node)
    found = methods()["branch"](problem, LONG_S, 0)
    assert found.proven
    for placement in found.plan.placements.values():
        assert placement.mesh in all_meshes(cluster)
        assert placement.strategy.size == placement.mesh.size
        assert per_node % placement.strategy.tp == 0
    walked = mcmc(problem, LONG_S, 1, num_moves=2000)
    assert found.iteration_s <= walked.iteration_s * (1 + 1e-9)


def test_alike_nodes_are_priced_once():
    """Moves between meshes that differ by whole nodes alone, and calls on meshes of one size."""
    problem = make_problem(short_graph(), Cluster(4, 2, "x"), 3)
    asked: list[object] = []
    costs: Any = problem.costs
    real = type(costs).reallocate_s

    class Counting(type(costs)):  # type: ignore[misc]
        def reallocate_s(self, role, src, dst):
            asked.append((role, src, dst))
            return real(self, role, src, dst)

    problem.costs = Counting(costs.seed, costs.moves, costs.bytes_scale)
    space = Spaces(problem)
    moves = space._moves
    for first in (0, 2, 4):
        pairs = [
            (a.placement, b.placement)
            for a in problem.candidates[2]
            for b in problem.candidates[0]
            if a.placement.mesh.first == first and b.placement.mesh.first == first + 2
            and a.placement.mesh.size == b.placement.mesh.size == 2
        ]  # fmt: skip
        assert pairs
        for a, b in pairs:
            moves.reallocate_s("actor", a, b)
    assert len(asked) == len(set(asked))
    assert len(asked) == len(pairs)
