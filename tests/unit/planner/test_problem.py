"""The tables of a problem mean the same as the augmented graph, the plan and the memory rules."""

from __future__ import annotations

import random

import pytest

from planner.memory import gpu_memory, worst_gpu
from planner.problem import Problem
from planner.simulator import simulate
from realloc.augmented import NodeKind, augment
from realloc.cluster import Cluster
from tests.unit.planner.problems import make_problem, ppo_graph, short_graph

CLUSTERS = [Cluster(1, 4, "made-up"), Cluster(2, 4, "made-up"), Cluster(3, 2, "made-up")]


def choices(problem: Problem, number: int, seed: int = 0):
    generator = random.Random(seed)
    for _ in range(number):
        choice = tuple(generator.randrange(len(rows)) for rows in problem.rows)
        if generator.random() < 0.5:  # often two calls of a role share a layout
            choice = (*choice[:1], *choice[1:3], choice[1], *choice[4:]) if len(choice) == 6 else choice
        if all(c < len(rows) for c, rows in zip(choice, problem.rows, strict=True)):
            yield choice


@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
@pytest.mark.parametrize("graph", [ppo_graph(), short_graph(), short_graph(verify=True)])
def test_a_choice_is_its_augmented_graph(cluster, graph):
    problem = make_problem(graph, cluster, 1, bytes_scale=0.0)
    for choice in choices(problem, 30):
        placements = problem.placements(choice)
        augmented = augment(graph, placements)
        schedule = problem.schedule(choice)
        assert set(schedule.order) == {node.name for node in augmented.nodes}
        augmented.check_order(schedule.order, "test")
        for node in augmented.nodes:
            seconds = schedule.node_s[node.name]
            if node.kind is NodeKind.CALL:
                expected = problem.costs.call_s(graph.by_name[node.name], placements[node.name])
                assert seconds == pytest.approx(expected)
                continue
            assert node.src is not None
            assert node.dst is not None
            if node.kind is NodeKind.TRANSFER:
                keys = graph.values_read(node.dst, node.keys)
                expected = problem.costs.transfer_s(keys, placements[node.src], placements[node.dst])
            else:
                assert node.role is not None
                expected = problem.costs.reallocate_s(node.role, placements[node.src], placements[node.dst])
            assert seconds == pytest.approx(expected)
        simulated = simulate(augmented, schedule.node_s, schedule.order).iteration_s
        assert schedule.period_s == pytest.approx(simulated)
        assert problem.evaluate(choice) == pytest.approx(simulated)


@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_memory_is_that_of_the_worst_gpu(cluster):
    graph = ppo_graph()
    problem = make_problem(graph, cluster, 2, bytes_scale=150.0)
    for choice in choices(problem, 40):
        placements, memory = problem.placements(choice), problem.memory(choice)
        every = [gpu_memory(graph, placements, memory, gpu).total_bytes for gpu in range(cluster.num_gpus)]
        assert problem.peak_bytes(choice) == max(every)
        assert worst_gpu(graph, placements, memory).total_bytes == max(every)
        fits = max(every) <= problem.capacity_bytes
        assert (problem.overflow_bytes(choice) == 0) == fits
        assert (problem.evaluate(choice) < float("inf")) == fits


def test_a_limit_only_hides_what_is_not_below_it():
    problem = make_problem(ppo_graph(), CLUSTERS[0], 3)
    for choice in choices(problem, 60):
        seconds = problem.evaluate(choice)
        if seconds == float("inf"):
            continue
        assert problem.evaluate(choice, seconds * 1.001) == seconds
        assert problem.evaluate(choice, seconds * 0.7) >= seconds * 0.7
