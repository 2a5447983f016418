"""Explanations: next best placements are worse, gains are real, and what memory forced is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from planner.api import search_plan
from planner.assess import Assessment
from planner.explain import Explanation, explain
from planner.explain_text import explanation_json, explanation_text
from realloc.augmented import Placement
from realloc.cluster import GIB, Cluster
from realloc.constraints import parse_constraints
from realloc.experiment import read_experiment
from realloc.files import Reader
from realloc.mesh import parse_mesh
from realloc.plan import ExecutionPlan
from realloc.strategy import Recompute, parse_strategy

RECIPE = Path(__file__).parents[3] / "experiments" / "recipes" / "ppo_llama7b_16xh100.yaml"


def searched(memory_gib: int) -> ExecutionPlan:
    cluster = Cluster(1, 8, "h100-sxm", memory_gib * GIB)
    return search_plan(read_experiment(RECIPE), cluster, time_limit_s=0.5).plan


@pytest.fixture(scope="module")
def tight() -> Explanation:
    """As little memory as lets the plan fit: recomputation or offload is forced."""
    return explain(searched(40), 20.0)


def test_next_best_and_gains_are_what_they_say(tight: Explanation) -> None:
    plan = tight.assessment.plan
    base = tight.assessment.iteration_s
    assert {call.name for call in tight.calls} == set(plan.placements)
    for call in tight.calls:
        other = call.next_best
        assert other is not None
        if other.iteration_s is not None:
            changed = replace(plan, placements=other.placements, order=other.order)
            assert Assessment(changed).iteration_s == pytest.approx(other.iteration_s, rel=1e-6)
        if call.with_memory is not None:
            assert call.with_memory.peak_bytes > tight.assessment.capacity_bytes
            assert call.with_memory.iteration_s < base
            placements = {**plan.placements, call.name: call.with_memory.placement}
            changed = replace(plan, placements=placements, order=call.with_memory.order)
            assert Assessment(changed).iteration_s == pytest.approx(call.with_memory.iteration_s, rel=1e-6)


def test_a_call_that_fits_in_one_layout_only_is_told_so() -> None:
    """All that fits beside the others has its degrees: the smallest other one is named, as too large."""
    cluster = Cluster(1, 8, "h100-sxm", 40 * GIB)
    mesh = parse_mesh("node0", cluster, "test")
    strategies = {
        "actor_gen": "d1t4p2m2",
        "rew_inf": "d1t1p8m64+offload",
        "ref_inf": "d4t2p1+sp+offload",
        "critic_inf": "d4t2p1+sp",
        "actor_train": "d1t4p2m4+sp+zb",
        "critic_train": "d4t2p1z2+sp+selective+offload",
    }
    placements = {name: Placement(mesh, parse_strategy(text, "test")) for name, text in strategies.items()}
    found = explain(ExecutionPlan(read_experiment(RECIPE), cluster, placements), 20.0)
    crowded = next(call.next_best for call in found.calls if call.name == "critic_inf")
    assert crowded is not None
    assert crowded.iteration_s is None
    assert crowded.peak_bytes > found.assessment.capacity_bytes
    strategy = crowded.placements["critic_inf"].strategy
    assert (strategy.dp, strategy.tp, strategy.pp) != (4, 2, 1)


def test_what_memory_forced(tight: Explanation) -> None:
    strategies = [p.strategy for p in tight.assessment.plan.placements.values()]
    assert any(s.offload or s.recompute is not Recompute.NONE or s.micro_batches > 1 for s in strategies)
    assert any(call.with_memory is not None for call in tight.calls)
    assert tight.without_memory_s is not None
    assert tight.without_memory_s < tight.assessment.iteration_s * 0.999
    text = explanation_text(tight)
    assert "Memory forced this" in text
    assert "what memory costs" in text


@pytest.fixture(scope="module")
def roomy() -> ExecutionPlan:
    return searched(100_000)


def test_plenty_of_memory_forces_nothing(roomy: ExecutionPlan) -> None:
    found = explain(roomy, 1.0)
    assert all(call.with_memory is None for call in found.calls)
    assert "Memory forces nothing" in explanation_text(found)


def test_a_poor_plan_is_told_what_it_overlooked(roomy: ExecutionPlan) -> None:
    poor = dict(roomy.placements)
    strategy = poor["ref_inf"].strategy
    poor["ref_inf"] = replace(poor["ref_inf"], strategy=replace(strategy, dp=1, tp=1, pp=8, micro_batches=1))
    found = explain(replace(roomy, placements=poor, order=None), 2.0)
    call = next(call for call in found.calls if call.name == "ref_inf")
    assert call.overlooked is not None
    assert call.overlooked.iteration_s < 0.99 * found.assessment.iteration_s
    assert "Better, and it fits" in explanation_text(found)


def test_a_plan_that_fits_nowhere_is_still_explained(tight: Explanation) -> None:
    plan = replace(tight.assessment.plan, cluster=Cluster(1, 8, "h100-sxm", 4 * GIB))
    text = explanation_text(explain(plan, 0.5))
    assert "It does not fit" in text
    assert "No other plan can be looked for" in text


def test_constraints_are_told(roomy: ExecutionPlan) -> None:
    content = {"reserve": ["node1"], "calls": {"actor_gen": {"dp": {"min": 1}}}}
    constraints = parse_constraints(Reader(content, "constraints"))
    experiment = replace(roomy.experiment, constraints=constraints)
    plan = replace(roomy, experiment=experiment, cluster=Cluster(2, 8, "h100-sxm"))
    text = explanation_text(explain(plan, 0.0))
    assert "Constrained by the experiment: reserve node[1], calls.actor_gen.dp {min: 1}." in text
    assert text.count("Constrained by the experiment: reserve node[1].") == len(plan.placements) - 1


def test_text_and_json(tight: Explanation) -> None:
    text = explanation_text(tight)
    assert max(map(len, text.splitlines())) <= 100
    for call in tight.calls:
        assert f"\n{call.name}: {call.placement.mesh.size} of 8 GPUs" in text
    assert "Costs are analytic (h100-sxm)" in text
    content = json.loads(explanation_json(tight))
    assert content["calls"].keys() == tight.assessment.plan.placements.keys()
    assert sum(content["split_s"].values()) == pytest.approx(content["iteration_s"])
    for call in content["calls"].values():
        assert sum(call["terms_s"].values()) == pytest.approx(call["seconds"])
