"""Comparisons: baselines stand beside the searched plan, with what they lose by or why they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.api import search_plan
from planner.baselines import Baseline
from planner.compare import Comparison, compare
from planner.compare_text import comparison_json, comparison_text
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.errors import InfeasibleError
from realloc.experiment import read_experiment
from realloc.mesh import DeviceMesh
from realloc.strategy import parse_strategy

RECIPE = Path(__file__).parents[3] / "experiments" / "recipes" / "ppo_llama7b_16xh100.yaml"


def everywhere(strategy: str):
    def place(experiment, cluster, costs):
        mesh = DeviceMesh(0, cluster.num_gpus, cluster.gpus_per_node)
        return {
            call.name: Placement(mesh, parse_strategy(strategy, "test")) for call in experiment.graph().calls
        }

    return place


def refuses(experiment, cluster, costs):
    raise InfeasibleError("no step of the rule fits.")


@pytest.fixture(scope="module")
def found() -> Comparison:
    searched = search_plan(read_experiment(RECIPE), Cluster(1, 8, "h100-sxm"), method="greedy").plan
    rules = {
        "tensors": Baseline("tensors", "tensor parallel", everywhere("d1t8p1m8")),
        "replicas": Baseline("replicas", "replicas", everywhere("d8t1p1")),
        "illegal": Baseline("illegal", "odd", everywhere("d2t3p1")),
        "gives-up": Baseline("gives-up", "none", refuses),
    }  # fmt: skip
    return compare(searched, rules)


def test_order_and_reasons(found: Comparison) -> None:
    assert found.searched.fits
    by_name = {contender.name: contender for contender in found.others}
    assert [contender.name for contender in found.others if contender.fits] == ["tensors"]
    slower = found.slower(by_name["tensors"])
    assert slower is not None
    assert slower > 1
    assert any("tp communication" in reason for reason in by_name["tensors"].why)
    assert found.slower(by_name["replicas"]) is None
    assert "may be used" in by_name["replicas"].why[0]
    assert "= 6, but mesh" in by_name["illegal"].why[0]
    assert by_name["gives-up"].why == ("no step of the rule fits.",)


def test_text_and_json(found: Comparison) -> None:
    text = comparison_text(found)
    assert max(map(len, text.splitlines())) <= 100
    for contender in (found.searched, *found.others):
        assert any(line.startswith(f"{contender.name} ") for line in text.splitlines())
    content = json.loads(comparison_json(found))
    assert [plan["name"] for plan in content["plans"]] == ["searched", *(c.name for c in found.others)]
    for plan in content["plans"]:
        if "split_s" in plan:
            assert sum(plan["split_s"].values()) == pytest.approx(plan["iteration_s"])
