"""Loads and offloads in augmented graphs: which there are, what they wait for, where they stand."""

from __future__ import annotations

import pytest

from realloc.augmented import (
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    Edge,
    NodeKind,
    Placement,
    augment,
    copied_causes,
    residences,
)
from realloc.dataflow import Call, CallKind, DataflowGraph, Output
from realloc.mesh import DeviceMesh
from realloc.strategy import parse_strategy
from tests.unit.planner.problems import keys, ppo_graph

GRAPH = ppo_graph()
BOTH = DeviceMesh(0, 4, 4)


def place(**strategies: str) -> dict[str, Placement]:
    """Everything on four GPUs as d4t1p1 but for what is given, such as `left:d2t1p1`."""
    meshes = {"": BOTH, "left": DeviceMesh(0, 2, 4), "right": DeviceMesh(2, 2, 4)}
    placements = {}
    for call in GRAPH.calls:
        where, _, text = strategies.get(call.name, "d4t1p1").rpartition(":")
        placements[call.name] = Placement(meshes[where], parse_strategy(text, "test"))
    return placements


def copies(placements: dict[str, Placement]) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    kinds = (NodeKind.LOAD, NodeKind.OFFLOAD)
    return {n.name: (n.ranks, n.keys) for n in augment(GRAPH, placements).nodes if n.kind in kinds}


def test_nothing_is_offloaded_unless_asked_for():
    assert residences(GRAPH, place()) == ()
    assert copies(place()) == {}


def test_a_frozen_role():
    placements = place(ref_inf="left:d1t2p1+offload")
    assert copies(placements) == {
        "load:ref:ref_inf": ((0, 1), (PARAMETERS,)),
        "offload:ref:ref_inf": ((0, 1), (PARAMETERS,)),
    }
    graph = augment(GRAPH, placements)
    about = {edge for edge in graph.edges if "load:" in edge.src + edge.dst}
    assert about == {
        Edge("load:ref:ref_inf", "ref_inf"),
        Edge("ref_inf", "offload:ref:ref_inf"),
        Edge("offload:ref:ref_inf", "load:ref:ref_inf", lag=1),
    }
    order = graph.default_order()
    at = order.index("ref_inf")
    assert order[at - 1 : at + 2] == ("load:ref:ref_inf", "ref_inf", "offload:ref:ref_inf")
    load, out = (graph.by_name[f"{kind}:ref:ref_inf"] for kind in ("load", "offload"))
    assert copied_causes(GRAPH, load) == (PARAMETERS,)
    assert copied_causes(GRAPH, out) == ()  # it has not changed


def test_training_in_a_layout_of_its_own():
    """Optimizer states leave before the reallocation, the parameters that it reads after it."""
    placements = place(actor_train="d2t2p1+offload")
    state, out, drop = (
        "load:actor:actor_train",
        "offload:actor:actor_train",
        ("offload:actor:actor_train:parameters"),
    )
    every = (0, 1, 2, 3)
    assert copies(placements) == {
        state: (every, (OPTIMIZER, GRADIENTS, PARAMETERS)),
        out: (every, (OPTIMIZER, GRADIENTS)),
        drop: (every, (PARAMETERS,)),
    }
    graph = augment(GRAPH, placements)
    order = [name for name in graph.default_order() if not name.startswith("transfer")]
    # the generation copy is there anyway, so it is filled at once
    assert order[-6:] == [state, "actor_train", out, "reallocate:actor:actor_gen", drop, "critic_train"]
    assert {edge.src for edge in graph.predecessors(drop)} == {"actor_train", "reallocate:actor:actor_gen"}
    assert {edge for edge in graph.edges if edge.dst == state} == {Edge(out, state, 1), Edge(drop, state, 1)}
    assert copied_causes(GRAPH, graph.by_name[state]) == (OPTIMIZER, PARAMETERS)
    assert copied_causes(GRAPH, graph.by_name[out]) == (OPTIMIZER,)


def test_parameters_that_another_call_uses_stay():
    placements = place(critic_inf="d2t2p1+offload", critic_train="d2t2p1m2+offload")
    assert {name: causes for name, (_, causes) in copies(placements).items()} == {
        "load:critic:critic_train": (OPTIMIZER, GRADIENTS),
        "offload:critic:critic_train": (OPTIMIZER, GRADIENTS),
    }


def test_a_copy_that_a_reallocation_fills_is_dropped_without_a_load():
    placements = place(actor_gen="d2t2p1+offload")
    assert copies(placements) == {"offload:actor:actor_gen": ((0, 1, 2, 3), (PARAMETERS,))}
    graph = augment(GRAPH, placements)
    assert Edge("offload:actor:actor_gen", "reallocate:actor:actor_gen") in graph.edges
    order = graph.default_order()
    assert order[order.index("actor_gen") + 1] == "offload:actor:actor_gen"
    (item,) = residences(GRAPH, placements)
    assert (item.first, item.is_kept) == ("reallocate:actor:actor_gen", False)


def test_loads_ahead_stand_before_the_call_before():
    graph = augment(GRAPH, place(ref_inf="d4t1p1+offload", rew_inf="left:d2t1p1"))
    order = graph.default_order()
    calls = [name for name in order if name in GRAPH.by_name]
    assert calls == [call.name for call in GRAPH.calls]
    ahead = graph.place_copies(order, ahead=True)
    graph.check_order(ahead, "test")
    assert ahead.index("load:ref:ref_inf") == ahead.index("rew_inf") - 1
    assert graph.place_copies(ahead) == order
    # a call on other ranks is none to overlap with
    apart = augment(GRAPH, place(rew_inf="left:d2t1p1", ref_inf="right:d2t1p1+offload"))
    ahead = apart.place_copies(apart.default_order(), ahead=True)
    assert ahead[:2] == ("load:ref:ref_inf", "actor_gen")


@pytest.mark.parametrize("second", ["d4t1p1", "d4t1p1+offload"])
def test_calls_that_share_a_copy_share_its_nodes(second: str):
    def infer(name: str, writes: str) -> Call:
        return Call(name, CallKind.INFERENCE, ("tokens",), (writes,), "judge", "tokens", Output.SCORES)

    graph = DataflowGraph((infer("a", "x"), infer("b", "y")), keys("tokens", "x", "y"), ("tokens",))
    placements = {
        "a": Placement(BOTH, parse_strategy("d4t1p1+offload", "test")),
        "b": Placement(BOTH, parse_strategy(second, "test")),
    }
    order = augment(graph, placements).default_order()
    if second == "d4t1p1":  # b wants it to stay
        assert order == ("a", "b")
    else:
        assert order == ("load:judge:a", "a", "b", "offload:judge:a")
