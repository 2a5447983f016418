"""Fits: which sizes are tried, the least that will do, the knee, and what is said about each."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.assess import ordered
from planner.baselines import BASELINES
from planner.fit import Fit, fit, sizes
from planner.fit_plot import fit_plot
from planner.fit_text import fit_json, fit_text
from realloc.clauses import Clauses
from realloc.cluster import Cluster
from realloc.constraints import parse_constraints
from realloc.errors import InfeasibleError
from realloc.experiment import Experiment, read_experiment
from realloc.files import Reader
from realloc.plan import ExecutionPlan
from realloc.strategy import Strategy

RECIPE = Path(__file__).parents[3] / "experiments" / "recipes" / "ppo_llama7b_16xh100.yaml"
CLUSTER = Cluster(2, 8, "h100-sxm")


def megatron(experiment: Experiment, cluster: Cluster) -> ExecutionPlan:
    """Stands in for search, which has its own tests: quick, and fits where enough GPUs are."""
    costs = CostModel(experiment, experiment.graph(), cluster, load_profile(cluster.device))
    placements = BASELINES["megatron"].place(experiment, cluster, costs)
    return ordered(ExecutionPlan(experiment, cluster, placements), costs)


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit(read_experiment(RECIPE), CLUSTER, 512, megatron)


def test_sizes() -> None:
    def of(nodes: int, gpus_per_node: int, most: int) -> list[tuple[int, int]]:
        cluster = Cluster(nodes, gpus_per_node, "x")
        return [(c.num_nodes, c.gpus_per_node) for c in sizes(cluster, most)]

    assert of(2, 8, 64) == [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (8, 8)]
    assert of(2, 8, 56) == [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (7, 8)]
    assert of(1, 6, 6) == [(1, 1), (1, 2), (1, 3), (1, 6)]
    assert of(4, 1, 3) == [(1, 1), (2, 1), (3, 1)]
    assert of(1, 8, 4) == [(1, 1), (1, 2), (1, 4)]


def test_points(found: Fit) -> None:
    fitting = [point for point in found.points if point.iteration_s is not None]
    assert found.least is fitting[0]
    assert found.points[0].assessment is None
    assert "fit" in found.points[0].why[0]
    for before, after in pairwise(fitting):
        # a larger cluster is never slower: it can run the smaller one's plan
        if after.cluster.gpus_per_node % before.cluster.gpus_per_node == 0:
            assert (after.iteration_s or 0.0) <= (before.iteration_s or 0.0) * (1 + 1e-9)
    point = fitting[-1]
    assert point.iteration_s is not None
    assert point.gpu_hours == pytest.approx(point.iteration_s * point.num_gpus / 3600 / 512 * 1000)


def test_the_knee_is_where_gpus_stop_paying(found: Fit) -> None:
    fitting = [point for point in found.points if point.iteration_s is not None]
    assert found.knee is not None
    at = fitting.index(found.knee)
    assert 0 < at < len(fitting) - 1
    gains = [gain for point in fitting[1:] if (gain := found.efficiency(point)) is not None]
    assert len(gains) == len(fitting) - 1
    assert min(gains[:at]) >= 0.7
    assert gains[at] < 0.7
    assert any("GPU-seconds" in why or "idle" in why or "is new" in why for why in fitting[at + 1].why)


def test_the_least_number_of_nodes_is_narrowed_down() -> None:
    experiment = read_experiment(RECIPE)

    def from_five_nodes_on(experiment: Experiment, cluster: Cluster) -> ExecutionPlan:
        if cluster.num_nodes < 5:
            raise InfeasibleError("too small.")
        return megatron(experiment, cluster)

    found = fit(experiment, CLUSTER, 128, from_five_nodes_on)
    assert found.least is not None
    assert found.least.cluster.num_nodes == 5
    assert [p.cluster.num_nodes for p in found.points if p.cluster.gpus_per_node == 8] == [
        1,
        2,
        4,
        5,
        6,
        8,
        16,
    ]


def test_a_plan_that_gets_no_faster_is_kept() -> None:
    experiment = read_experiment(RECIPE)

    def lazy(experiment: Experiment, cluster: Cluster) -> ExecutionPlan:
        """Finds something worse on more than two nodes."""
        plan = megatron(experiment, replace(cluster, num_nodes=min(cluster.num_nodes, 2)))
        if cluster.num_nodes > 2:
            slow = replace(plan.placements["ref_inf"].strategy, dp=1, tp=8, pp=2, micro_batches=1)
            worse = {**plan.placements, "ref_inf": replace(plan.placements["ref_inf"], strategy=slow)}
            return ExecutionPlan(experiment, cluster, worse)
        return replace(plan, cluster=cluster)

    found = fit(experiment, CLUSTER, 64, lazy)
    last = found.points[-1]
    assert last.kept == 16
    assert last.iteration_s == pytest.approx(next(p.iteration_s for p in found.points if p.num_gpus == 16))
    assert "no faster; the plan for 16 GPUs is still the best found" in fit_text(found)


def test_constraints_that_small_clusters_cannot_meet_are_told_size_by_size() -> None:
    content = {"calls": {"actor_gen": {"tp": 8}, "rew_inf": {"mesh": "node1"}}}
    constraints = parse_constraints(Reader(content, "constraints"))
    experiment = replace(read_experiment(RECIPE), constraints=constraints)

    def checked(experiment: Experiment, cluster: Cluster) -> ExecutionPlan:
        Clauses(experiment.constraints, experiment.graph(), cluster)
        return megatron(experiment, cluster)

    found = fit(experiment, CLUSTER, 16, checked)
    assert [point.assessment is None for point in found.points] == [True, True, True, True, False]
    assert "calls.actor_gen.tp 8 leaves nothing to choose" in found.points[0].why[0]
    assert "lies outside the cluster" in found.points[3].why[0]


def test_a_slice_can_keep_the_plan_of_a_smaller_one() -> None:
    experiment = read_experiment(RECIPE)

    def lazy(experiment: Experiment, cluster: Cluster) -> ExecutionPlan:
        """Finds something worse on eight GPUs than on four."""
        if cluster.num_gpus < 8:
            return megatron(experiment, cluster)
        plan = megatron(experiment, cluster)
        slow = {
            name: replace(p, strategy=Strategy(tp=8, micro_batches=64)) for name, p in plan.placements.items()
        }
        return ExecutionPlan(experiment, cluster, slow)

    found = fit(experiment, Cluster(1, 8, "h100-sxm"), 8, lazy)
    four, eight = found.points[-2:]
    assert four.iteration_s is not None
    assert eight.kept == 4
    assert eight.iteration_s == pytest.approx(four.iteration_s)
    assert eight.assessment is not None
    eight.assessment.plan.check()
    assert str(eight.assessment.plan.placements["actor_gen"].mesh) == "node0:gpu[0-3]"


def test_nothing_fits() -> None:
    def never(experiment: Experiment, cluster: Cluster) -> ExecutionPlan:
        raise InfeasibleError("actor_train needs 116.1 GiB.")

    found = fit(read_experiment(RECIPE), CLUSTER, 16, never)
    assert found.least is None
    assert "It does not fit on up to 16 GPUs." in fit_text(found)
    ET.fromstring(fit_plot(found))


def test_text_json_and_plot(found: Fit) -> None:
    text = fit_text(found)
    assert max(map(len, text.splitlines())) <= 100
    assert found.knee is not None
    assert f"The knee is at {found.knee.num_gpus} GPUs" in text
    content = json.loads(fit_json(found))
    assert content["knee_gpus"] == found.knee.num_gpus
    assert [point["gpus"] for point in content["points"]] == [point.num_gpus for point in found.points]
    plot = fit_plot(found)
    root = ET.fromstring(plot)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2 * sum(point.iteration_s is not None for point in found.points)
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height
    assert not re.search(r"https?:(?!//www.w3.org/2000/svg)", plot)
