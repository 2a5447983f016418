"""Rules of thumb as plans: legal and within memory on clusters of many forms, for graphs of any shape."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.baselines import BASELINES, savings
from planner.baselines.groups import divided
from planner.memory import worst_gpu
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.dataflow import CallKind
from realloc.errors import InfeasibleError
from realloc.experiment import Experiment, ModelSpec, OptimizerSpec, Workload
from realloc.lengths import Lengths
from realloc.model_zoo import named_shapes
from realloc.plan import ExecutionPlan
from realloc.strategy import Recompute


def experiment(
    actor: str, critic: str | None = None, *, sequences: int = 512, algorithm: str = "ppo"
) -> Experiment:
    shapes = (
        {"actor": actor}
        if critic is None
        else {"actor": actor, "ref": actor, "critic": critic, "reward": critic}
    )
    models = {
        role: ModelSpec(role, name, named_shapes()[name], OptimizerSpec()) for role, name in shapes.items()
    }
    work = Workload(sequences, Lengths(128.0, 128), Lengths(128.0, 128))
    return Experiment(algorithm, models, work, dtype="bfloat16")


def grpo() -> Experiment:
    """Three roles, four samples of each prompt."""
    models = {
        role: ModelSpec(role, "llama-7b", named_shapes()["llama-7b"], OptimizerSpec())
        for role in ("actor", "ref", "reward")
    }
    work = Workload(256, Lengths(128.0, 128), Lengths(64.0, 256), samples_per_prompt=4)
    return Experiment("grpo", models, work, dtype="bfloat16")


def placed(name: str, made: Experiment, cluster: Cluster) -> tuple[CostModel, Mapping[str, Placement]]:
    costs = CostModel(made, made.graph(), cluster, load_profile(cluster.device))
    return costs, BASELINES[name].place(made, cluster, costs)


CASES = {
    "one node": (experiment("llama-7b", "llama-7b"), Cluster(1, 8, "h100-sxm")),
    "two nodes of 4": (experiment("llama-7b", "qwen2.5-0.5b"), Cluster(2, 4, "a100-80gb")),
    "sft, heads that 8 does not divide": (experiment("qwen2.5-0.5b", algorithm="sft"), Cluster(1, 8, "h200")),
    "grpo": (grpo(), Cluster(2, 8, "a100-80gb")),
    "nodes of 6": (experiment("llama-7b", "llama-7b"), Cluster(4, 6, "h200")),
    "16 nodes": (experiment("llama-70b", "llama-7b"), Cluster(16, 8, "h100-sxm")),
}


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("case", CASES)
def test_plans_are_legal_and_fit(name: str, case: str):
    made, cluster = CASES[case]
    costs, placements = placed(name, made, cluster)
    ExecutionPlan(made, cluster, placements).check()
    memory = {call.name: costs.call_memory(call, placements[call.name]) for call in costs.graph.calls}
    assert worst_gpu(costs.graph, placements, memory).total_bytes <= costs.memory_bytes


def test_each_rule_places_as_its_system_is_known_for():
    made, cluster = experiment("llama-34b", "llama-7b"), Cluster(4, 8, "h100-sxm")
    plans = {name: placed(name, made, cluster)[1] for name in BASELINES}
    for name in ("megatron", "deepspeed-chat", "verl", "realhf-heuristic"):
        assert {placement.mesh.size for placement in plans[name].values()} == {32}
    assert {p.strategy.tp for p in plans["megatron"].values()} == {8}
    assert {(p.strategy.dp, p.strategy.tp, p.strategy.pp) for p in plans["realhf-heuristic"].values()} == {
        (1, 8, 4)
    }
    train = plans["deepspeed-chat"]["actor_train"].strategy
    assert (train.dp, train.zero) == (32, 3)
    assert plans["verl"]["actor_gen"].strategy.tp < plans["verl"]["actor_train"].strategy.tp
    groups = plans["openrlhf"]
    assert not groups["actor_gen"].mesh.overlaps(groups["actor_train"].mesh)
    assert not groups["critic_train"].mesh.overlaps(groups["actor_train"].mesh)
    assert groups["critic_inf"].mesh == groups["critic_train"].mesh
    assert groups["actor_train"].mesh.size > groups["critic_train"].mesh.size


def test_what_a_plan_saves_to_fit_is_said():
    made, roomy = experiment("llama-13b", "llama-13b"), Cluster(1, 8, "h200")
    assert "offload" not in " ".join(savings(placed("megatron", made, roomy)[1]))
    tight = Cluster(1, 8, "a100-40gb")
    found = savings(placed("megatron", made, tight)[1])
    assert any(line.startswith("ref_inf") and "offload" in line for line in found)
    assert any(line.startswith("actor_train: 8 micro-batches") for line in found)


def test_a_rule_that_cannot_fit_says_by_how_much():
    with pytest.raises(
        InfeasibleError, match=r"megatron on 1 node x 8 a100-40gb: does not fit: .* GiB on GPU 0"
    ):
        placed("megatron", experiment("llama-70b", "llama-70b"), Cluster(1, 8, "a100-40gb"))
    with pytest.raises(
        InfeasibleError, match="actor_train: dp 512 exceeds the 128 sequences of a mini-batch"
    ):
        placed("deepspeed-chat", experiment("llama-7b", "llama-7b"), Cluster(64, 8, "h100-sxm"))


def test_groups_need_a_gpu_each():
    with pytest.raises(
        InfeasibleError, match="openrlhf on .*: not possible: 2 GPUs are fewer than the groups"
    ):
        placed("openrlhf", experiment("qwen2.5-0.5b", "qwen2.5-0.5b"), Cluster(1, 2, "h200"))


def test_the_heuristic_of_realhf_recomputes_and_keeps_frozen_models_in_host_memory():
    made, cluster = CASES["one node"]
    costs, placements = placed("realhf-heuristic", made, cluster)
    for call in costs.graph.calls:
        strategy = placements[call.name].strategy
        assert (strategy.recompute is Recompute.FULL) == (call.kind is CallKind.TRAIN_STEP)
        assert strategy.offload == (call.role in ("ref", "reward"))


@pytest.mark.parametrize("cluster", [Cluster(1, 8, "x"), Cluster(2, 6, "x"), Cluster(7, 8, "x")])
def test_groups_are_legal_disjoint_and_larger_where_there_is_more_to_do(cluster: Cluster):
    loads = [8.0, 4.0, 1.0]
    meshes = divided(cluster, loads)
    assert meshes is not None
    for mesh in meshes:
        mesh.check(cluster, "group")
    ranks = [rank for mesh in meshes for rank in mesh.ranks]
    assert len(ranks) == len(set(ranks))
    assert meshes[0].size >= meshes[1].size >= meshes[2].size
    assert divided(Cluster(1, 2, "x"), loads) is None
