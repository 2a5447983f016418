"""Offload in the planner: memory over time and copies on the side, by hand; and whole searches."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest

from planner.api import search_plan
from planner.keeping import Limits
from planner.memory import gpu_memory
from planner.rows import load
from planner.simulator import simulate
from realloc.augmented import AugmentedGraph, Edge, Node, NodeKind, Placement, augment
from realloc.cluster import Cluster
from realloc.errors import InfeasibleError
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy
from tests.unit.cost_models.cases import experiment
from tests.unit.planner.problems import TableMemory, make_problem, ppo_graph, short_graph

GRAPH = ppo_graph()
BOTH = DeviceMesh(0, 4, 4)
TIGHT = Limits(most_micro_batches=1, offload_from=0.0)


def test_memory_over_time_by_hand():
    """Everything on the same GPUs; generation and training in layouts of their own."""
    placements = {
        "actor_gen": Placement(BOTH, Strategy(4, 1, 1, offload=True)),
        "rew_inf": Placement(BOTH, Strategy(1, 4, 1, offload=True)),
        "ref_inf": Placement(BOTH, Strategy(1, 4, 1)),
        "critic_inf": Placement(BOTH, Strategy(1, 4, 1)),
        "actor_train": Placement(BOTH, Strategy(1, 4, 1, offload=True)),
        "critic_train": Placement(BOTH, Strategy(1, 4, 1, 2, offload=True)),  # shares critic_inf's copy
    }
    memory = {
        "actor_gen": TableMemory(100, working={"kv_cache": 70}),
        "rew_inf": TableMemory(40, working={"activations": 10}),
        "ref_inf": TableMemory(50, working={"activations": 10}),
        "critic_inf": TableMemory(30, working={"activations": 10}),
        "actor_train": TableMemory(25, 25, 100, working={"activations": 60}),
        "critic_train": TableMemory(30, 30, 120, working={"activations": 80}),
    }
    augmented = augment(GRAPH, placements)
    by_default = augmented.default_order()
    always = 50 + 30
    # the reallocation comes last: the trained parameters wait for it beside critic_train
    assert by_default.index("critic_train") < by_default.index("reallocate:actor:actor_gen")
    found = gpu_memory(GRAPH, placements, memory, 1)
    assert found.by_cause == {
        "parameters": always + 25, "gradients": 30, "optimizer": 120, "activations": 80,
    }  # fmt: skip
    assert found.call == "critic_train"
    # reallocated at once, the generation copy is there when critic_train runs, and is not when
    # actor_train does
    others = [n for n in by_default if n not in ("reallocate:actor:actor_gen", "critic_train")]
    early = augmented.place_copies([*others, "reallocate:actor:actor_gen", "critic_train"])
    found = gpu_memory(GRAPH, placements, memory, 1, early)
    assert found.total_bytes == always + 100 + (30 + 120 + 80)
    memory["critic_train"] = TableMemory(30)
    found = gpu_memory(GRAPH, placements, memory, 1, early)
    assert (found.call, found.total_bytes) == ("actor_train", always + 25 + 25 + 100 + 60)
    memory["actor_train"] = TableMemory(25)
    found = gpu_memory(GRAPH, placements, memory, 1, early)
    assert (found.call, found.total_bytes) == ("actor_gen", always + 100 + 70)
    memory["actor_gen"] = TableMemory(100)
    found = gpu_memory(GRAPH, placements, memory, 1, early)
    assert (found.call, found.total_bytes) == ("reallocate:actor:actor_gen", always + 100 + 25)
    resident = {name: replace_offload(p) for name, p in placements.items()}
    everything = 100 + 40 + 50 + 30 + 25 + 10  # rew_inf's working set, or ref_inf's
    assert gpu_memory(GRAPH, resident, memory, 1).total_bytes == everything


def replace_offload(placement: Placement) -> Placement:
    return Placement(placement.mesh, replace(placement.strategy, offload=False))


def test_order_decides_what_meets():
    """A load ahead of time meets the working set of the call before."""
    placements = {call.name: Placement(BOTH, Strategy(4, 1, 1)) for call in GRAPH.calls}
    placements["ref_inf"] = Placement(BOTH, Strategy(4, 1, 1, offload=True))
    memory = {call.name: TableMemory() for call in GRAPH.calls}
    memory["ref_inf"] = TableMemory(50, working={"activations": 5})
    memory["rew_inf"] = TableMemory(0, working={"activations": 30})
    graph = augment(GRAPH, placements)
    order = graph.default_order()
    assert order.index("rew_inf") < order.index("ref_inf")
    assert gpu_memory(GRAPH, placements, memory, 0, order).total_bytes == 55
    ahead = graph.place_copies(order, ahead=True)
    early = gpu_memory(GRAPH, placements, memory, 0, ahead)
    assert (early.total_bytes, early.call) == (80, "rew_inf")


def _loading(rank: int = 0) -> AugmentedGraph:
    """x, then y, which needs a load; two iterations follow each other."""
    return AugmentedGraph(
        (
            Node("x", NodeKind.CALL, (rank,)),
            Node("load:r:y", NodeKind.LOAD, (rank,)),
            Node("y", NodeKind.CALL, (rank,)),
            Node("offload:r:y", NodeKind.OFFLOAD, (rank,)),
        ),
        (
            Edge("x", "y"),
            Edge("load:r:y", "y"),
            Edge("y", "offload:r:y"),
            Edge("offload:r:y", "load:r:y", lag=1),
        ),
    )


@pytest.mark.parametrize(
    ("overlaps", "ahead", "load_s", "expected"),
    [
        (False, False, 2.0, 3 + 2 + 4 + 1),  # the GPU copies
        (True, False, 2.0, 3 + 2 + 4 + 1),  # the load's turn comes after x
        (True, True, 2.0, 3 + 4 + 1),  # hidden behind x
        (True, True, 5.0, 5 + 4 + 1),  # longer than x: y waits
    ],
)
def test_a_copy_engine_works_beside_the_call_before(overlaps, ahead, load_s, expected):
    graph = _loading()
    node_s = {"x": 3.0, "load:r:y": load_s, "y": 4.0, "offload:r:y": 1.0}
    order = graph.place_copies(graph.default_order(), ahead=ahead)
    simulation = simulate(graph, node_s, order, overlaps_loads=overlaps)
    assert simulation.iteration_s == pytest.approx(expected)
    assert simulation.busy[0].ranks == (0,)
    assert simulation.busy[0].busy_s == pytest.approx(8 if overlaps else 8 + load_s)


def test_a_load_starts_no_earlier_than_its_turn():
    """It takes memory from its place in the order on, so it cannot start before what comes earlier."""
    graph = _loading()
    node_s = {"x": 3.0, "load:r:y": 2.0, "y": 4.0, "offload:r:y": 1.0}
    late = simulate(graph, node_s, graph.default_order(), overlaps_loads=True)
    assert late.start_s["load:r:y"] == pytest.approx(late.end_s["x"])


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("graph", [ppo_graph(), short_graph()])
def test_a_choice_is_its_augmented_graph(graph, overlaps):
    problem = make_problem(graph, Cluster(1, 4, "x"), 1, bytes_scale=150.0, limits=TIGHT)
    object.__setattr__(problem.costs, "overlaps_host_copies", overlaps)
    generator = random.Random(3)
    fitting = 0
    for _ in range(60):
        choice = tuple(generator.randrange(len(rows)) for rows in problem.rows)
        placements, memory = problem.placements(choice), problem.memory(choice)
        augmented = augment(graph, placements)
        schedule = problem.schedule(choice)
        augmented.check_order(schedule.order, "test")
        for node in augmented.nodes:
            if node.kind is NodeKind.LOAD:
                name = str(node.dst)
                assert node.keys
                causes = tuple(cause for cause in node.keys if cause != "gradients")
                expected = sum(getattr(memory[name], cause) for cause in causes) / 1000
                assert schedule.node_s[node.name] == pytest.approx(expected)
        peaks = [gpu_memory(graph, placements, memory, gpu, schedule.order).total_bytes for gpu in range(4)]
        rows = [table[c] for table, c in zip(problem.rows, choice, strict=True)]
        for gpu, peak in enumerate(peaks):
            assert load(rows, gpu)[0] <= peak  # the quick look never rejects what fits
        assert problem.peak_bytes(choice) == max(peaks)
        if max(peaks) > problem.capacity_bytes:
            assert problem.evaluate(choice) == inf
            continue
        fitting += 1
        simulated = simulate(augmented, schedule.node_s, schedule.order, overlaps_loads=overlaps)
        assert problem.evaluate(choice) == pytest.approx(simulated.iteration_s)
    assert fitting > 5


def test_offload_only_where_memory_is_tight():
    roomy = make_problem(GRAPH, Cluster(1, 4, "x"), 0, bytes_scale=10.0, limits=Limits(most_micro_batches=1))
    tight = make_problem(GRAPH, Cluster(1, 4, "x"), 0, bytes_scale=600.0, limits=Limits(most_micro_batches=1))

    def offloads(problem, call):
        return {c.placement.strategy.offload for c in problem.candidates[call]}

    assert all(offloads(roomy, call) == {False} for call in range(6))
    names = [call.name for call in GRAPH.calls]
    assert all(offloads(tight, names.index(n)) == {False, True} for n in ("ref_inf", "actor_train"))
    assert offloads(tight, names.index("critic_inf")) == {False}


def test_what_fits_only_with_offload_is_found():
    """Two models of 34B in training need 2 x 18 bytes x 34e9 / 8 = 153 GB a GPU; an H200 has 141."""
    made, cluster = experiment("llama-34b", sequences=64), Cluster(1, 8, "h200")
    with pytest.raises(InfeasibleError):
        search_plan(made, cluster, method="greedy", time_limit_s=20, limits=Limits(offload_from=inf))
    result = search_plan(made, cluster, method="greedy", time_limit_s=20)
    plan = result.plan
    assert plan.predictions is not None
    assert plan.order is not None
    assert any(plan.placements[n].strategy.offload for n in ("actor_train", "critic_train"))
    assert result.memory.total_bytes <= result.capacity_bytes
    loads = {n: s for n, s in plan.predictions.node_s.items() if n.startswith("load:")}
    assert loads
    assert all(seconds > 0 for seconds in loads.values())
    plan.check()
    plan.augmented.check_order(plan.order, "test")
