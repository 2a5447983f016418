"""Assessments and budgets: every second of every GPU is accounted for, once; slack is what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.memory import CallMemory
from planner.api import search_plan
from planner.assess import Assessment
from planner.budget import Cause, budget, kinds_of, reasons
from planner.memory import gpu_memory
from planner.simulator import simulate
from planner.words import span
from realloc.cluster import Cluster
from realloc.experiment import read_experiment
from realloc.plan import ExecutionPlan
from realloc.strategy import parse_strategy

RECIPE = Path(__file__).parents[3] / "experiments" / "recipes" / "ppo_llama7b_16xh100.yaml"
CLUSTER = Cluster(1, 8, "h100-sxm")


@pytest.fixture(scope="module")
def plan() -> ExecutionPlan:
    """With critic and reference on GPUs of their own, so that some wait."""
    experiment = read_experiment(RECIPE)
    found = search_plan(experiment, CLUSTER, method="greedy").plan
    whole = found.placements["actor_train"].mesh
    left, right = replace(whole, size=4), replace(whole, first=4, size=4)
    train = parse_strategy("d1t4p1m8z0+full+offload", "test")
    infer = parse_strategy("d1t4p1m8", "test")
    placements = {
        "actor_gen": replace(found.placements["actor_gen"], mesh=left, strategy=infer),
        "actor_train": replace(found.placements["actor_gen"], mesh=left, strategy=train),
        "ref_inf": replace(found.placements["actor_gen"], mesh=left, strategy=infer),
        "rew_inf": replace(found.placements["actor_gen"], mesh=right, strategy=infer),
        "critic_inf": replace(found.placements["actor_gen"], mesh=right, strategy=infer),
        "critic_train": replace(found.placements["actor_gen"], mesh=right, strategy=train),
    }
    return ExecutionPlan(experiment, CLUSTER, placements)


def test_every_second_of_every_gpu_is_accounted_for(plan: ExecutionPlan) -> None:
    found = Assessment(plan)
    assert [shared.name for shared in found.shared] == ["0-3", "4-7"]
    for shared in found.shared:
        busy = sum(found.node_s[name] for name in shared.nodes if found.occupies(name))
        nodes = [plan.augmented.by_name[name] for name in shared.nodes if found.occupies(name)]
        alone = [node for node in nodes if set(node.ranks) == set(shared.ranks)]
        waited = sum(found.waiting_s[node.name] for node in alone)
        # nodes on both halves wait for the later one: their mean lies between 0 and twice the half's own
        both = [node for node in nodes if node not in alone]
        assert busy + waited <= found.iteration_s * (1 + 1e-9)
        assert busy + waited + 2 * sum(found.waiting_s[n.name] for n in both) >= found.iteration_s * (
            1 - 1e-9
        )
    causes = budget(found)
    assert sum(causes.values()) == pytest.approx(found.iteration_s)
    assert causes[Cause("GPUs idle", "idle")] == pytest.approx(found.idle_share * found.iteration_s)
    assert sum(kinds_of(causes).values()) == pytest.approx(found.iteration_s)
    assert found.idle_share > 0.05


def test_terms_and_kinds_add_up(plan: ExecutionPlan) -> None:
    found = Assessment(plan)
    for name in plan.placements:
        time = found.call_time(name)
        assert sum(time.terms.values()) == pytest.approx(time.seconds)
        assert sum(time.kinds.values()) == pytest.approx(time.seconds)


def test_slack_is_what_a_call_may_take_longer(plan: ExecutionPlan) -> None:
    found = Assessment(plan)
    some_slack = 0
    for name in plan.placements:
        slack = found.slack_s(name)
        for extra, is_longer in ((0.98 * slack, False), (1.02 * slack + 1e-3 * found.iteration_s, True)):
            node_s = {**found.node_s, name: found.node_s[name] + extra}
            spent = simulate(
                plan.augmented, node_s, found.order, overlaps_loads=found.overlaps_loads
            ).iteration_s
            assert (spent > found.iteration_s * (1 + 1e-6)) is is_longer, name
        some_slack += slack > 0
    assert 0 < some_slack < len(plan.placements)


def test_reasons_name_what_grew(plan: ExecutionPlan) -> None:
    found = Assessment(plan)
    placements = dict(plan.placements)
    slow = replace(placements["critic_inf"], strategy=parse_strategy("d1t1p4", "test"))
    worse = Assessment(replace(plan, placements={**placements, "critic_inf": slow}))
    assert worse.iteration_s > found.iteration_s
    assert any("bubble in critic_inf" in reason for reason in reasons(found, worse))
    assert reasons(found, found) == ()


def test_span() -> None:
    assert span([0, 1, 2, 7, 9, 10]) == "0-2 and 7 and 9-10"


def test_memory_is_of_the_stages_that_are_on_a_gpu(plan: ExecutionPlan) -> None:
    """The fullest of all GPUs, each with its own stages: less than the fullest stages of calls together."""
    whole = replace(plan.placements["actor_gen"].mesh, size=8)
    strategies = {"actor_gen": "d1t2p4m1", "critic_train": "d1t4p2m8z0+full", "rew_inf": "d8t1p1m8"}
    placements = dict(plan.placements)
    for name, text in strategies.items():
        placements[name] = replace(placements[name], mesh=whole, strategy=parse_strategy(text, "test"))
    found = Assessment(replace(plan, placements=placements, order=None))

    def peak(gpu: int, memory: Mapping[str, CallMemory]) -> int:
        return gpu_memory(plan.graph, placements, memory, gpu, found.order).total_bytes

    every = [peak(gpu, found.memory_on(gpu)) for gpu in range(8)]
    assert len(set(every)) > 2
    assert found.memory.total_bytes == max(every)
    assert found.memory.gpu == every.index(max(every))
    assert found.fullest(range(4, 8)).total_bytes == max(every[4:])
    together = [peak(gpu, found.call_memory) for gpu in range(8)]
    assert max(every) < max(together)
    generated = [found.memory_on(gpu)["actor_gen"] for gpu in range(8)]
    assert [memory == generated[gpu // 2 * 2] for gpu, memory in enumerate(generated)] == [True] * 8
    assert generated[0] != generated[2] != generated[6]  # embedding, layers alone, head
