"""Search finds what exhaustive search finds, repeats itself, and says when there is nothing to find."""

from __future__ import annotations

import pytest

from planner.bounds import capacity_bound_s, dependency_bound_s, lower_bound_s
from planner.search import methods
from planner.search.mcmc import mcmc
from realloc.cluster import Cluster
from realloc.errors import InfeasibleError, InputError
from tests.unit.planner.problems import make_problem, ppo_graph, short_graph

ONE, TWO, FOUR = Cluster(1, 1, "x"), Cluster(1, 2, "x"), Cluster(1, 4, "x")
LONG_S = 600.0


@pytest.mark.parametrize("seed", range(24))
def test_three_calls_on_four_gpus_reach_the_optimum(seed):
    graph = short_graph(verify=seed % 3 == 0)
    scale = (0.0, 250.0, 400.0)[seed % 3]
    problem = make_problem(graph, FOUR, seed, moves=(0.05, 0.5)[seed % 2], bytes_scale=scale)
    best = methods()["exhaustive"](problem, LONG_S, 0)
    assert best.proven
    assert best.lower_bound_s == pytest.approx(best.iteration_s)
    found = methods()["auto"](problem, LONG_S, seed)
    assert found.iteration_s == pytest.approx(best.iteration_s)


@pytest.mark.parametrize("seed", range(8))
def test_ppo_on_two_gpus_reaches_the_optimum(seed):
    problem = make_problem(ppo_graph(), TWO, seed, bytes_scale=(0.0, 60.0)[seed % 2])
    best = methods()["exhaustive"](problem, LONG_S, 0)
    found = methods()["auto"](problem, LONG_S, seed)
    assert found.iteration_s == pytest.approx(best.iteration_s)
    assert lower_bound_s(problem) <= best.iteration_s * (1 + 1e-9)


@pytest.mark.parametrize("method", ["auto", "greedy", "mcmc"])
def test_methods_are_sound_and_repeat_themselves(method):
    def search(seed: int):
        problem = make_problem(ppo_graph(), Cluster(2, 2, "x"), 7)
        if method == "mcmc":
            return mcmc(problem, LONG_S, seed, num_moves=1500)
        return methods()[method](problem, LONG_S, seed)

    first, second = search(3), search(3)
    assert first.plan.placements == second.plan.placements
    assert first.plan.order == second.plan.order
    assert first.evaluated == second.evaluated
    assert [p.iteration_s for p in first.history] == [p.iteration_s for p in second.history]
    assert first.memory.total_bytes <= first.capacity_bytes
    assert first.lower_bound_s <= first.iteration_s
    gains = [p.iteration_s for p in first.history]
    assert gains == sorted(gains, reverse=True)


def test_auto_is_no_worse_than_its_parts():
    for seed in range(4):
        problem = make_problem(ppo_graph(), FOUR, seed)
        found = methods()["auto"](problem, LONG_S, 0).iteration_s
        assert found <= methods()["greedy"](problem, LONG_S, 0).iteration_s * (1 + 1e-9)
        assert found <= mcmc(problem, LONG_S, 0, num_moves=2000).iteration_s * (1 + 1e-9)


def test_exhaustive_refuses_large_problems():
    problem = make_problem(ppo_graph(), FOUR, 0, bytes_scale=0.0)
    with pytest.raises(InputError, match="too many"):
        methods()["exhaustive"](problem, LONG_S, 0)


@pytest.mark.parametrize("method", ["auto", "greedy", "exhaustive"])
def test_calls_that_fit_alone_but_not_together(method):
    # every call fits on its own, but one GPU has to hold four roles, two of them with optimizer state
    problem = make_problem(ppo_graph(), ONE, 1, bytes_scale=120.0, capacity=500)
    with pytest.raises(InfeasibleError) as caught:
        methods()[method](problem, LONG_S, 0)
    message = str(caught.value)
    assert "fits on its own" in message
    assert "parameters" in message
    assert "only 500 bytes may be used" in message


def test_time_limit_cuts():
    problem = make_problem(ppo_graph(), Cluster(2, 4, "x"), 7)
    found = methods()["auto"](problem, 0.0, 0)
    assert found.evaluated < 20_000
    assert found.iteration_s > 0


def test_bounds_by_hand():
    # memory plays no part; the bounds follow from the tables alone
    problem = make_problem(short_graph(), FOUR, 0, bytes_scale=0.0)
    fastest = [min(row[0] for row in rows) for rows in problem.rows]
    # gen -> score -> train -> gen of the next iteration
    assert dependency_bound_s(problem) == pytest.approx(sum(fastest))
    area = [min(row[0] * (row[2] - row[1]) for row in rows) for rows in problem.rows]
    assert capacity_bound_s(problem) >= max(sum(area) / 4, *fastest) * (1 - 1e-12)


def test_what_does_not_feed_the_actor_may_overlap_the_next_iteration():
    """The critic's step is on no cycle with generation, so the bound must not add them up."""
    problem = make_problem(ppo_graph(), Cluster(2, 4, "x"), 0, bytes_scale=0.0, moves=0.0)
    fastest = [min(row[0] for row in rows) for rows in problem.rows]
    gen, rew, ref, critic, actor_train, critic_train = fastest
    expected = max(gen + max(rew, ref, critic) + actor_train, critic + critic_train)
    assert dependency_bound_s(problem) == pytest.approx(expected)


@pytest.mark.parametrize("seed", [1, 3, 5, 7])
def test_ppo_on_four_gpus_reaches_the_proven_optimum(seed):
    """16.8 million plans: more than exhaustive search can try, few enough for branch and bound."""
    problem = make_problem(ppo_graph(), FOUR, seed)
    proven = methods()["branch"](problem, LONG_S, 0)
    assert proven.proven
    found = methods()["auto"](problem, LONG_S, seed)
    assert found.iteration_s == pytest.approx(proven.iteration_s)


@pytest.mark.parametrize("seed", range(6))
def test_branch_and_bound_is_exhaustive(seed):
    problem = make_problem(short_graph(), FOUR, 100 + seed, bytes_scale=(0.0, 350.0)[seed % 2])
    exhaustive = methods()["exhaustive"](problem, LONG_S, 0)
    proven = methods()["branch"](problem, LONG_S, 0)
    assert proven.proven
    assert proven.iteration_s == pytest.approx(exhaustive.iteration_s)
