"""Constrained search: the optimum is exhaustive search's under the same filter, and nothing else is lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import pytest

from planner.api import make_problem as real_problem
from planner.api import search_plan
from planner.candidates import build_candidates
from planner.keeping import Limits
from planner.problem import Problem
from planner.search import methods
from realloc.clauses import Clauses
from realloc.cluster import GIB, Cluster
from realloc.constraints import parse_constraints
from realloc.dataflow import DataflowGraph
from realloc.errors import InfeasibleError, InputError
from realloc.experiment import Experiment, read_experiment
from realloc.files import Reader
from realloc.plan import ExecutionPlan
from realloc.strategy import Recompute
from tests.unit.planner.problems import CAPACITY, TableCosts, make_experiment, short_graph

RECIPE = Path(__file__).parents[3] / "experiments" / "recipes" / "ppo_llama7b_16xh100.yaml"
FOUR = Cluster(1, 4, "x")
LIMITS = Limits(most_micro_batches=1, offload_from=inf, degrees_only=True)


def constrained(experiment: Experiment, content: dict[str, Any]) -> Experiment:
    return replace(experiment, constraints=parse_constraints(Reader(content, "constraints")))


def table_problem(graph: DataflowGraph, seed: int, content: dict[str, Any]) -> Problem:
    experiment = constrained(make_experiment(graph), content)
    costs = TableCosts(seed, 0.3, 250.0)
    candidates = build_candidates(experiment, graph, FOUR, costs, CAPACITY, LIMITS)
    return Problem(experiment, graph, FOUR, costs, candidates, CAPACITY)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "content",
    [
        {"reserve": ["node0:gpu[3]"]},
        {"all": {"tp": {"max": 2}}, "calls": {"train": {"pp": {"min": 2}}}},
        {"calls": {"gen": {"mesh": "node0:gpu[0-1]"}, "score": {"mesh": ["node0:gpu[2]", "node0:gpu[3]"]}}},
        {"roles": {"actor": {"forbid": ["d1t1p4", {"dp": {"min": 2}, "tp": 1}]}}},
    ],
)
def test_the_optimum_is_that_of_exhaustive_search_with_the_same_filter(seed, content) -> None:
    graph = short_graph()
    free = table_problem(graph, seed, {})
    clauses = Clauses(parse_constraints(Reader(content, "constraints")), graph, FOUR)
    allowed = [
        [i for i, candidate in enumerate(row) if clauses.allows(call.name, candidate.placement)]
        for call, row in zip(graph.calls, free.candidates, strict=True)
    ]
    best = min(free.evaluate(choice) for choice in product(*allowed))
    unconstrained = methods()["exhaustive"](free, 600.0, 0).iteration_s
    for method in ("exhaustive", "auto", "branch"):
        found = methods()[method](table_problem(graph, seed, content), 600.0, 0)
        assert found.iteration_s == pytest.approx(best)
        assert found.iteration_s >= unconstrained * (1 - 1e-9)
        assert all(clauses.allows(name, placement) for name, placement in found.plan.placements.items())


REACHABLE = {
    "zero 0": {"zero": 0, "dp": {"min": 2}},
    "zero 3": {"zero": 3},
    "full recomputation": {"recompute": "full"},
    "gpipe": {"schedule": "gpipe"},
    "interleaved, recomputing": {"schedule": "interleaved", "virtual_stages": 4, "recompute": "selective"},
    "zero bubbles": {"schedule": "zero_bubble", "pp": 4},
    "six micro-batches": {"micro_batches": 6},
    "offload": {"offload": True},
    "sequence parallel": {"sequence_parallel": True, "tp": 2},
}


@pytest.mark.parametrize("rule", REACHABLE.values(), ids=REACHABLE.keys())
def test_whatever_a_plan_may_say_can_be_asked_for(rule) -> None:
    experiment = constrained(read_experiment(RECIPE), {"calls": {"actor_train": rule}})
    problem = real_problem(experiment, Cluster(1, 4, "h100-sxm", 160 * GIB))
    clauses = Clauses(experiment.constraints, problem.graph, problem.cluster)
    found = problem.candidate_set.candidates["actor_train"]
    assert found
    assert all(clauses.allows("actor_train", candidate.placement) for candidate in found)


def test_a_constrained_plan_keeps_to_its_constraints_and_carries_them(tmp_path: Path) -> None:
    content = {
        "reserve": ["node1:gpu[4-7]"],
        "all": {"offload": False},
        "roles": {"reward": {"mesh": "node1:gpu[0-3]"}},
        "calls": {"actor_train": {"recompute": "full", "tp": {"max": 4}}},
    }
    experiment = constrained(read_experiment(RECIPE), content)
    plan: ExecutionPlan = search_plan(experiment, Cluster(2, 8, "h100-sxm"), time_limit_s=0.5).plan
    plan.check()
    assert str(plan.placements["rew_inf"].mesh) == "node1:gpu[0-3]"
    assert plan.placements["actor_train"].strategy.recompute is Recompute.FULL
    assert all(placement.mesh.ranks[-1] < 12 for placement in plan.placements.values())


def test_nothing_left_names_the_call_the_constraints_and_the_counts() -> None:
    content = {"calls": {"actor_train": {"mesh": "node0:gpu[0]", "recompute": "full"}}}
    with pytest.raises(InfeasibleError) as caught:
        real_problem(constrained(read_experiment(RECIPE), content), Cluster(1, 8, "h100-sxm"))
    message = str(caught.value)
    assert message.startswith("actor_train: the experiment's constraints leave no placement: of ")
    assert "calls.actor_train.mesh node0:gpu[0] refuses " in message
    assert "that they allow do not fit in memory (such as d1t1p1" in message
    rule = {"calls": {"actor_gen": {"micro_batches": 600}}}
    with pytest.raises(InfeasibleError, match=r"calls.actor_gen.micro_batches 600 refuses \d"):
        real_problem(constrained(read_experiment(RECIPE), rule), Cluster(1, 8, "h100-sxm"))


def test_what_fits_nowhere_anyway_blames_no_constraint() -> None:
    experiment = constrained(read_experiment(RECIPE), {"calls": {"rew_inf": {"tp": 1}}})
    with pytest.raises(InfeasibleError, match="actor_gen fits nowhere"):
        real_problem(experiment, Cluster(1, 1, "h100-sxm", 8 * GIB))


def test_contradictions_end_planning() -> None:
    content = {"reserve": ["node0"], "calls": {"actor_gen": {"mesh": "node0"}}}
    with pytest.raises(InputError, match=r"reserve node\[0\] and calls.actor_gen.mesh node\[0\] contradict"):
        search_plan(constrained(read_experiment(RECIPE), content), Cluster(2, 8, "h100-sxm"))
