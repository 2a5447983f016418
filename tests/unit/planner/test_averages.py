"""A reference that follows the actor is a node that search prices as the runtime executes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.api import search_plan
from planner.simulator import simulate
from realloc.augmented import NodeKind, Placement, augment, reallocations
from realloc.cluster import Cluster
from realloc.dataflow import Average
from realloc.errors import InputError, PlanError
from realloc.evaluation import EvaluationSpec, with_evaluation
from realloc.experiment import Experiment, parse_experiment
from realloc.files import Reader
from realloc.mesh import parse_mesh
from realloc.plan import ExecutionPlan
from realloc.strategy import parse_strategy

CONTENT: Mapping[str, Any] = {
    "algorithm": "ppo",
    "models": dict.fromkeys(("actor", "critic", "ref", "reward"), "qwen2.5-0.5b"),
    "workload": {"sequences": 64, "prompt_tokens": 128, "response_tokens": 128},
    "cluster": {"nodes": 1, "gpus_per_node": 2, "device": "h100-sxm"},
}
MOVE = "reallocate:ref:ref_inf"


def experiment(decay: float, **more: Any) -> Experiment:
    content = {**CONTENT, "hyperparameters": {"ref_ema_decay": decay}, **more}
    return parse_experiment(Reader(content, "experiment"), Path())


@pytest.mark.parametrize("method", ["branch", "greedy"])
def test_search_prices_the_graph_that_runs(method: str) -> None:
    cluster = experiment(0.9).cluster
    assert cluster is not None
    plan = search_plan(experiment(0.9), cluster, method=method, time_limit_s=10.0).plan
    predictions = plan.predictions
    assert predictions is not None
    assert MOVE in plan.augmented.by_name
    assert predictions.node_s[MOVE] > 0
    simulated = simulate(plan.augmented, predictions.node_s, plan.node_order)
    assert predictions.iteration_s == pytest.approx(simulated.iteration_s, rel=1e-6)
    without = search_plan(experiment(1.0), cluster, method=method, time_limit_s=10.0).plan
    assert MOVE not in without.augmented.by_name
    assert without.predictions is not None
    assert without.predictions.iteration_s <= predictions.iteration_s * (1 + 1e-9)


def test_search_and_plan_agree_on_evaluation() -> None:
    """Both count the same share of its calls and of what moves between them, lengths alone too."""
    of = experiment(0.9, evaluation={"every": 4, "win_rate": True})
    assert of.cluster is not None
    found = search_plan(of, of.cluster, method="greedy", time_limit_s=10.0)
    predictions = found.plan.predictions
    assert predictions is not None
    assert any(node.every for node in found.plan.augmented.nodes if node.kind is NodeKind.TRANSFER)
    assert found.iteration_s == pytest.approx(predictions.iteration_s, rel=1e-9)


def test_mixing_costs_memory_and_time_even_where_nothing_moves() -> None:
    mesh = parse_mesh("node0", Cluster(1, 2, "cpu"), "test")
    placement = Placement(mesh, parse_strategy("d2t1p1", "test"))
    found = {}
    for decay in (0.9, 1.0):
        of = experiment(decay)
        assert of.cluster is not None
        costs = CostModel(of, of.graph(), of.cluster, load_profile(of.cluster.device))
        memory = costs.call_memory(of.graph().by_name["ref_inf"], placement)
        found[decay] = (memory.parameters, costs.reallocate_s("ref", placement, placement))
    assert found[0.9][0] == 2 * found[1.0][0]
    assert found[0.9][1] > 0 == found[1.0][1]


def test_the_average_waits_for_the_actor_and_for_who_reads_it() -> None:
    of = experiment(0.9)
    assert of.cluster is not None
    plan = search_plan(of, of.cluster, time_limit_s=2.0).plan
    graph = augment(plan.graph, plan.placements)
    edges = {(edge.src, edge.dst, edge.lag) for edge in graph.edges}
    assert {("actor_train", MOVE, 0), ("ref_inf", MOVE, 0), (MOVE, "ref_inf", 1)} <= edges


def test_what_cannot_be_is_refused() -> None:
    of = experiment(0.9)
    assert of.cluster is not None
    plan = search_plan(of, of.cluster, time_limit_s=2.0).plan
    placement = plan.placements["ref_inf"]
    away = Placement(placement.mesh, replace(placement.strategy, offload=True))
    moved = ExecutionPlan(plan.experiment, plan.cluster, {**plan.placements, "ref_inf": away})
    with pytest.raises(PlanError, match="ref is a moving average"):
        moved.check()
    wrong = replace(plan.graph, averages=(Average("critic", "actor", 0.9),))
    with pytest.raises(InputError, match="critic is the moving average of actor"):
        wrong.check()


def test_evaluation_keeps_the_average() -> None:
    """Its call of the reference has the parameters that are mixed, by one node where both lie alike."""
    graph = with_evaluation(experiment(0.9).graph(), EvaluationSpec(2))
    graph.check()
    mesh = parse_mesh("node0", Cluster(1, 2, "cpu"), "test")
    placements = {call.name: Placement(mesh, parse_strategy("d2t1p1", "test")) for call in graph.calls}
    assert set(reallocations(graph, placements).values()) == {("ref", MOVE)}
    assert "eval_ref_inf" in reallocations(graph, placements)
