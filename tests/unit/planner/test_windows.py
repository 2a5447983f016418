"""Bounds hold for every plan in every order; branch and bound on them finds what exhaustive search finds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from planner.keeping import Limits
from planner.search import methods
from planner.search.method import Record
from planner.search.prover import Prover
from planner.search.space import Spaces
from planner.search.tree import Bounder
from planner.simulator import simulate
from realloc.augmented import augment
from realloc.cluster import Cluster
from realloc.errors import InfeasibleError
from tests.unit.planner.problems import make_problem, ppo_graph, random_graph, short_graph

LONG_S = 600.0
CLUSTERS = (
    Cluster(1, 2, "x"),
    Cluster(1, 4, "x"),
    Cluster(2, 2, "x"),
    Cluster(3, 1, "x"),
    Cluster(2, 6, "x"),
)


def graph_of(seed: int):
    return (ppo_graph(), short_graph(), random_graph(seed, 3 + seed % 5), random_graph(seed, 9))[seed % 4]


def shuffled(augmented, generator: random.Random) -> tuple[str, ...]:
    """A topological order of one iteration, drawn at random."""
    waits = {n.name: {e.src for e in augmented.predecessors(n.name) if e.lag == 0} for n in augmented.nodes}
    order: list[str] = []
    while waits:
        name = generator.choice(sorted(n for n, before in waits.items() if not before & waits.keys()))
        order.append(name)
        del waits[name]
    return tuple(order)


@pytest.mark.parametrize("seed", range(40))
def test_no_plan_in_any_order_is_below_its_bound(seed):
    """Of complete choices, and of the same with some calls left open."""
    graph = graph_of(seed)
    problem = make_problem(graph, CLUSTERS[seed % 5], seed, moves=(0.0, 0.3)[seed % 2], bytes_scale=0.0)
    spaces = Spaces(problem)
    space = spaces.every_candidate()
    generator = random.Random(seed)
    bounder = Bounder(spaces.windows, space.items, space.prices)
    for _ in range(6):
        choice = tuple(generator.randrange(len(rows)) for rows in problem.rows)
        node_s = problem.schedule(choice).node_s
        augmented = augment(graph, problem.placements(choice))
        least = min(
            simulate(augmented, node_s, order).iteration_s
            for order in (problem.schedule(choice).order, *(shuffled(augmented, generator) for _ in range(4)))
        )
        row = np.array([choice], dtype=np.int32)
        for move, (user, trainer) in enumerate(problem.users):
            ends = space.items[user].layouts[row[:, user]], space.items[trainer].layouts[row[:, trainer]]
            space.prices.ask(move, *ends)
        assert bounder.bounds(row)[0] <= least * (1 + 1e-9)
        for call in generator.sample(range(len(choice)), len(choice)):
            row[0, call] = -1
            assert bounder.bounds(row)[0] <= least * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_branch_and_bound_is_exhaustive_search(seed):
    """Random graphs, memory tight on some."""
    graph = (short_graph(verify=seed % 2 == 0), random_graph(seed, 3 + seed % 2))[seed % 3 > 0]
    scale = (0.0, 250.0, 400.0)[seed % 3]
    problem = make_problem(graph, (Cluster(1, 4, "x"), Cluster(2, 2, "x"))[seed % 2], seed, bytes_scale=scale)
    try:
        best = methods()["exhaustive"](problem, LONG_S, 0)
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            methods()["branch"](problem, LONG_S, 0)
        return
    found = methods()["branch"](problem, LONG_S, 0)
    assert found.proven
    assert found.iteration_s == pytest.approx(best.iteration_s)


@pytest.mark.parametrize("seed", range(12))
def test_kinds_first_finds_the_same(seed, monkeypatch):
    """What large problems do, on small ones."""
    problem = make_problem(ppo_graph(), Cluster(1, 2, "x"), seed, bytes_scale=(0.0, 60.0)[seed % 2])
    best = methods()["exhaustive"](problem, LONG_S, 0)
    monkeypatch.setattr("planner.search.prover.FLAT_UP_TO", 0)
    found = methods()["branch"](problem, LONG_S, 0)
    assert found.proven
    assert found.iteration_s == pytest.approx(best.iteration_s)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_that_fits_is_refused(seed):
    problem = make_problem(graph_of(seed), CLUSTERS[seed % 5], seed, bytes_scale=(150.0, 300.0)[seed % 2])
    space = Spaces(problem).every_candidate()
    generator = random.Random(seed)
    fitting = refused = 0
    for _ in range(300):
        choice = tuple(generator.randrange(len(rows)) for rows in problem.rows)
        calls = list(range(len(choice)))
        generator.shuffle(calls)
        row = np.array([choice], dtype=np.int32)
        allowed = all(space.room.allows(row, calls[: depth + 1])[0] for depth in range(len(calls)))
        fits = problem.overflow_bytes(choice) == 0
        assert allowed or not fits
        fitting += fits
        refused += not allowed
    assert fitting + refused > 0


def test_an_interrupt_keeps_the_best_plan(monkeypatch):
    problem = make_problem(ppo_graph(), Cluster(2, 4, "x"), 7)
    evaluate, seen = Record.evaluate, []

    def interrupted(self, *arguments, **named):
        seen.append(1)
        if len(seen) == 200:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **named)

    monkeypatch.setattr(Record, "evaluate", interrupted)
    found = methods()["auto"](problem, LONG_S, 0)
    assert found.interrupted
    assert not found.proven
    assert 0 < found.lower_bound_s <= found.iteration_s


@pytest.mark.parametrize("seed", range(60))
def test_the_bound_of_all_counts_what_large_clusters_leave_out(seed):
    """The best plan of a problem that keeps everything is above what one that keeps little proves of all."""
    graph = (short_graph(verify=seed % 2 == 0), random_graph(seed, 3 + seed % 2))[seed % 3 > 0]
    cluster = (Cluster(1, 4, "x"), Cluster(2, 2, "x"))[seed % 2]
    scale = (0.0, 250.0, 400.0)[seed % 3]
    few = Limits(1200, 1, 0, fastest=1, smallest=0, offload_from=math.inf, far_front=1, degrees_only=True)
    whole = make_problem(graph, cluster, seed, bytes_scale=scale)
    part = make_problem(graph, cluster, seed, bytes_scale=scale, limits=few)
    assert any(part.others)
    try:
        best = methods()["exhaustive"](whole, LONG_S, 0)
        found = Record(part, LONG_S)
        found.best_s = best.iteration_s * 2
        Prover(found, Spaces(part)).count_all()
    except InfeasibleError:
        return
    assert 0 < found.bound_of_all_s <= best.iteration_s * (1 + 1e-9)
