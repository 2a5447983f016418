"""Peak memory of a plan, added up by hand."""

from __future__ import annotations

from planner.memory import gpu_memory, worst_gpu
from realloc.augmented import Placement
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy
from tests.unit.planner.problems import TableMemory, ppo_graph

GRAPH = ppo_graph()
LEFT, RIGHT, BOTH = DeviceMesh(0, 2, 4), DeviceMesh(2, 2, 4), DeviceMesh(0, 4, 4)


def test_by_hand():
    placements = {
        "actor_gen": Placement(BOTH, Strategy(4, 1, 1)),
        "rew_inf": Placement(LEFT, Strategy(1, 2, 1)),
        "ref_inf": Placement(RIGHT, Strategy(1, 2, 1)),
        "critic_inf": Placement(RIGHT, Strategy(1, 2, 1)),
        "actor_train": Placement(BOTH, Strategy(4, 1, 1, micro_batches=2)),  # shares gen's layout
        "critic_train": Placement(RIGHT, Strategy(2, 1, 1)),  # not critic_inf's
    }
    memory = {
        "actor_gen": TableMemory(100, working={"kv_cache": 70, "activations": 5}),
        "rew_inf": TableMemory(40, working={"activations": 10}),
        "ref_inf": TableMemory(50, working={"activations": 10}),
        "critic_inf": TableMemory(30, working={"activations": 10}),
        "actor_train": TableMemory(100, 100, 400, working={"activations": 60}),
        "critic_train": TableMemory(60, 60, 240, working={"activations": 80}),
    }
    left = gpu_memory(GRAPH, placements, memory, 1)
    assert left.by_cause == {
        "parameters": 100 + 40, "gradients": 100, "optimizer": 400, "kv_cache": 70, "activations": 5,
    }  # fmt: skip
    assert left.call == "actor_gen"
    assert left.total_bytes == 715
    right = worst_gpu(GRAPH, placements, memory)
    assert right.gpu == 2
    assert right.call == "critic_train"
    assert right.by_cause == {
        "parameters": 100 + 50 + 30 + 60, "gradients": 160, "optimizer": 640, "activations": 80,
    }  # fmt: skip


def test_a_gpu_that_no_call_uses_needs_nothing():
    placements = {call.name: Placement(LEFT, Strategy(2, 1, 1)) for call in GRAPH.calls}
    memory = {call.name: TableMemory(10) for call in GRAPH.calls}
    assert gpu_memory(GRAPH, placements, memory, 3).total_bytes == 0
    # one layout a role: four roles, ten bytes each
    assert worst_gpu(GRAPH, placements, memory).total_bytes == 40
