"""Candidates are legal, complete where nothing is said to be left out, and fit in memory."""

from __future__ import annotations

import pytest

from planner.candidates import build_candidates
from planner.keeping import Limits
from realloc.cluster import Cluster
from realloc.dataflow import CallKind
from realloc.errors import InfeasibleError
from realloc.mesh import all_meshes
from realloc.strategy import Strategy, forbidden
from tests.unit.planner.problems import (
    CAPACITY,
    SHAPE,
    TableCosts,
    make_experiment,
    make_problem,
    ppo_graph,
    short_graph,
)


@pytest.mark.parametrize("cluster", [Cluster(1, 4, "x"), Cluster(2, 8, "x"), Cluster(2, 6, "x")], ids=str)
def test_every_legal_placement_is_there_and_no_other(cluster):
    problem = make_problem(ppo_graph(), cluster, 0, bytes_scale=0.0)
    expected = set()
    for mesh in all_meshes(cluster):
        for dp in range(1, mesh.size + 1):
            for tp in range(1, mesh.size + 1):
                for pp in range(1, mesh.size + 1):
                    strategy = Strategy(dp, tp, pp)
                    fits = dp * tp * pp == mesh.size and cluster.gpus_per_node % tp == 0
                    if fits and forbidden(strategy, SHAPE) is None:
                        expected.add((mesh, strategy))
    for candidates in problem.candidates:
        assert {(c.placement.mesh, c.placement.strategy) for c in candidates} == expected
        seconds = [c.option.seconds for c in candidates]
        assert seconds == sorted(seconds)
        for c in candidates:
            c.placement.mesh.check(cluster, "test")
            c.placement.strategy.check(c.placement.mesh, SHAPE, "test")


def test_compute_calls_use_data_parallelism_alone():
    problem = make_problem(short_graph(verify=True), Cluster(1, 4, "x"), 0)
    score = problem.candidates[1]
    assert {c.placement.strategy for c in score} == {Strategy(1), Strategy(2), Strategy(4)}


def test_dp_stays_within_the_sequences_of_a_mini_batch():
    graph = short_graph()
    experiment = make_experiment(graph, sequences=2)
    found = build_candidates(experiment, graph, Cluster(1, 8, "x"), TableCosts(0, 0.1, 0.0), CAPACITY)
    for candidates in found.candidates.values():
        for candidate in candidates:
            strategy = candidate.placement.strategy
            assert strategy.dp <= 2
            assert strategy.dp * strategy.micro_batches <= 2
    reasons = {r.reason for r in found.rejections if r.call == "train"}
    assert "dp exceeds the sequences of a mini-batch" in reasons


def test_memory_prunes_and_says_so():
    graph = ppo_graph()
    cluster = Cluster(1, 4, "x")
    free = make_problem(graph, cluster, 0, bytes_scale=0.0)
    tight = make_problem(graph, cluster, 0, bytes_scale=500.0)
    for call, every, kept in zip(graph.calls, free.candidates, tight.candidates, strict=True):
        assert all(c.option.total_bytes <= CAPACITY for c in kept)
        counts = {r.reason: r for r in tight.candidate_set.rejections if r.call == call.name}
        lost = counts["does not fit in memory"].count if "does not fit in memory" in counts else 0
        assert len(kept) + lost == len(every)
        if call.kind is CallKind.TRAIN_STEP:
            assert lost > 0
            assert f"of {CAPACITY} bytes a GPU" in counts["does not fit in memory"].example


def test_micro_batches_stay_where_each_is_faster_or_smaller():
    problem = make_problem(short_graph(), Cluster(1, 4, "x"), 5, limits=Limits())
    for candidates in problem.candidates:
        for a in candidates:
            for b in candidates:
                if a is not b and a.placement.layout_key == b.placement.layout_key:
                    better = a.option.seconds <= b.option.seconds
                    assert not (better and a.option.total_bytes <= b.option.total_bytes)


def test_a_call_that_fits_nowhere_is_named_with_its_numbers():
    graph = ppo_graph()
    with pytest.raises(InfeasibleError) as caught:
        make_problem(graph, Cluster(1, 2, "x"), 0, bytes_scale=50_000.0)
    message = str(caught.value)
    assert message.startswith("actor_gen fits nowhere: even node[0] d1t")
    assert "parameters" in message
    assert "only 1000 bytes may be used" in message
    assert "more or larger GPUs" in message


def test_large_clusters_keep_few_strategies_a_mesh():
    limits = Limits(most_micro_batches=1, keep_all_up_to=20, fastest=2, smallest=1)
    problem = make_problem(ppo_graph(), Cluster(8, 8, "x"), 0, limits=limits)
    reasons = {r.reason for r in problem.candidate_set.rejections}
    assert "slower than others on the same mesh (large cluster; the second bound counts it)" in reasons
    train = problem.candidates[4]
    gen_layouts = {c.placement.layout_key for c in problem.candidates[0]}
    # calls of one role keep each other's layouts, where they fit
    assert len({c.placement.layout_key for c in train} & gen_layouts) > len(train) // 2


def test_very_large_clusters_keep_aligned_meshes():
    problem = make_problem(ppo_graph(), Cluster(128, 8, "x"), 0, limits=Limits(1200, 1, 40, 1, 0))
    meshes = {c.placement.mesh for c in problem.candidates[0]}
    assert len(meshes) <= 1200
    assert max(mesh.size for mesh in meshes) == 1024
    assert {mesh.size for mesh in meshes} >= {8, 16, 32, 64, 512}
