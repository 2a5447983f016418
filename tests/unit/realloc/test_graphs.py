"""Dataflow graphs refuse what cannot run; augmented graphs hold what a plan implies and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from realloc.augmented import (
    AugmentedGraph,
    Edge,
    NodeKind,
    Placement,
    augment,
    home_call,
    needs_transfer,
    reallocations,
)
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.errors import InputError, PlanError
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy
from tests.unit.realloc.make import small_graph


def with_call(graph: DataflowGraph, name: str, /, **changes: object) -> DataflowGraph:
    calls = tuple(replace(call, **changes) if call.name == name else call for call in graph.calls)  # type: ignore[arg-type]
    return replace(graph, calls=calls)


def plus(graph: DataflowGraph, call: Call, *keys: DataKey) -> DataflowGraph:
    return replace(graph, calls=(*graph.calls, call), keys=(*graph.keys, *keys))


def test_edges_follow_from_keys() -> None:
    graph = small_graph()
    graph.check()
    assert graph.roles == ("actor", "reward")
    assert graph.producer == {"tokens": "gen", "scores": "score"}
    assert graph.data_edges() == {
        ("gen", "score"): ("tokens",),
        ("gen", "train"): ("tokens",),
        ("score", "train"): ("scores",),
    }
    trainer = graph.trainer("actor")
    assert trainer is not None
    assert trainer.name == "train"
    assert graph.trainer("reward") is None
    assert home_call(graph, "actor").name == "train"
    assert home_call(graph, "reward").name == "score"
    lags = {(a, b): data["lag"] for a, b, data in graph.as_networkx().edges(data=True)}
    assert lags == {("gen", "score"): 0, ("gen", "train"): 0, ("score", "train"): 0, ("train", "gen"): 1}


def loop() -> DataflowGraph:
    """score needs what extra writes, and the other way round."""
    graph = with_call(small_graph(), "score", reads=("tokens", "more"))
    extra = Call(
        "extra", CallKind.COMPUTE, ("tokens", "scores"), ("more",), sequence="tokens", function="m:f"
    )
    return plus(graph, extra, DataKey("more", Per.SEQUENCE))


def two_trainers() -> DataflowGraph:
    again = Call(
        "again", CallKind.TRAIN_STEP, ("tokens",), (), "actor", "tokens", Output.LOGPROBS, loss="loss"
    )
    return plus(small_graph(), again)


def two_writers() -> DataflowGraph:
    return plus(
        small_graph(),
        Call("score2", CallKind.INFERENCE, ("tokens",), ("scores",), "reward", "tokens", Output.SCORES),
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (loop, "a cycle within one iteration: "),
        (two_trainers, "role actor is trained by train, again"),
        (two_writers, "'scores' is written by score and by score2"),
        (lambda: with_call(small_graph(), "score", name="gen"), "two calls are named 'gen'"),
        (
            lambda: with_call(small_graph(), "score", writes=("prompts",)),
            "'prompts' is written by the data set and by score",
        ),
        (
            lambda: with_call(small_graph(), "train", reads=("tokens", "score")),
            "train uses 'score', which is not declared. Did you mean 'scores'?",
        ),
        (lambda: replace(small_graph(), source_keys=()), "gen reads 'prompts', which nobody writes"),
        (lambda: with_call(small_graph(), "train", loss=None), "train is a train_step and needs 'loss'"),
        (lambda: with_call(small_graph(), "gen", role=None), "gen is a generate and needs 'role'"),
        (lambda: with_call(small_graph(), "score", output=None), "score is a inference and needs 'output'"),
        (
            lambda: with_call(small_graph(), "score", sequence="prompts"),
            "works on 'prompts' without reading it",
        ),
        (lambda: with_call(small_graph(), "train", mini_batches=0), "at least one mini-batch"),
        (lambda: with_call(small_graph(), "train", selected=4), "train selects 4 sequences"),
        (lambda: with_call(small_graph(), "train", select="pick"), "train selects 0 sequences"),
        (
            lambda: with_call(small_graph(), "gen", select="pick", selected=4),
            "gen selects 4 sequences: only inference and train_step select",
        ),
        (
            lambda: with_call(small_graph(), "train", select="pick", selected=3, together=2),
            "train selects 3 sequences",
        ),
        (
            lambda: with_call(small_graph(), "train", prepared=("advantage",)),
            "train uses 'advantage', which is not declared",
        ),
    ],
)
def test_graphs_that_cannot_run(make: Callable[[], DataflowGraph], expected: str) -> None:
    with pytest.raises(InputError, match="^dataflow graph: ") as caught:
        make().check()
    assert expected in str(caught.value)


def test_a_call_that_writes_nothing() -> None:
    graph = with_call(small_graph(), "train", reads=("tokens",))
    with pytest.raises(InputError, match="score writes nothing"):
        with_call(graph, "score", writes=()).check()


ALL = DeviceMesh(0, 4, 4)
LEFT, RIGHT = DeviceMesh(0, 2, 4), DeviceMesh(2, 2, 4)
TP4 = Placement(ALL, Strategy(tp=4))


def names(graph: AugmentedGraph) -> set[str]:
    return {node.name for node in graph.nodes}


def edges(graph: AugmentedGraph) -> set[tuple[str, str, int]]:
    return {(edge.src, edge.dst, edge.lag) for edge in graph.edges}


def test_one_layout_for_all_adds_no_node() -> None:
    graph = augment(small_graph(), {"gen": TP4, "score": TP4, "train": TP4})
    assert [node.name for node in graph.nodes] == ["gen", "score", "train"]
    assert edges(graph) == {
        ("gen", "score", 0),
        ("gen", "train", 0),
        ("score", "train", 0),
        ("train", "gen", 1),
        ("train", "train", 1),
    }
    assert graph.default_order() == ("gen", "score", "train")


def test_a_plan_adds_transfers_and_a_reallocation() -> None:
    placements = {
        "gen": Placement(ALL, Strategy(dp=4)),
        "score": Placement(RIGHT, Strategy(tp=2)),
        "train": Placement(LEFT, Strategy(pp=2)),
    }
    graph = augment(small_graph(), placements)
    assert names(graph) == {
        "gen",
        "score",
        "train",
        "transfer:gen:score",
        "transfer:gen:train",
        "transfer:score:train",
        "reallocate:actor:gen",
    }
    assert edges(graph) == {
        ("gen", "transfer:gen:score", 0),
        ("transfer:gen:score", "score", 0),
        ("gen", "transfer:gen:train", 0),
        ("transfer:gen:train", "train", 0),
        ("score", "transfer:score:train", 0),
        ("transfer:score:train", "train", 0),
        ("train", "train", 1),
        ("train", "reallocate:actor:gen", 0),  # new weights move once trained ...
        ("gen", "reallocate:actor:gen", 0),  # ... and the old ones are no longer used
        ("reallocate:actor:gen", "gen", 1),
    }
    move = graph.by_name["reallocate:actor:gen"]
    assert (move.kind, move.role, move.src, move.dst) == (NodeKind.REALLOCATE, "actor", "train", "gen")
    assert move.ranks == (0, 1, 2, 3)
    scores = graph.by_name["transfer:score:train"]
    assert (scores.kind, scores.keys, scores.ranks) == (NodeKind.TRANSFER, ("scores",), (0, 1, 2, 3))
    assert graph.by_name["score"].ranks == (2, 3)
    assert set(graph.predecessors("train")) == {
        Edge("transfer:gen:train", "train"),
        Edge("transfer:score:train", "train"),
        Edge("train", "train", 1),
    }
    order = graph.default_order()
    graph.check_order(order, "plan")
    assert order.index("score") < order.index("transfer:score:train") < order.index("train")


def test_calls_with_one_layout_share_a_reallocation() -> None:
    again = Call("check", CallKind.INFERENCE, ("tokens",), ("lp",), "actor", "tokens", Output.LOGPROBS)
    graph = plus(small_graph(), again, DataKey("lp", Per.RESPONSE_TOKEN))
    graph.check()
    dp4 = Placement(ALL, Strategy(dp=4))
    placements = {
        "gen": dp4,
        "check": Placement(ALL, Strategy(dp=4, micro_batches=3)),
        "score": TP4,
        "train": TP4,
    }
    moved = reallocations(graph, placements)
    assert moved == {
        "gen": ("actor", "reallocate:actor:gen"),
        "check": ("actor", "reallocate:actor:gen"),
    }
    augmented = augment(graph, placements)
    assert sum(node.kind is NodeKind.REALLOCATE for node in augmented.nodes) == 1
    assert {
        ("gen", "reallocate:actor:gen", 0),
        ("check", "reallocate:actor:gen", 0),
        ("reallocate:actor:gen", "gen", 1),
        ("reallocate:actor:gen", "check", 1),
    } <= edges(augmented)


def test_when_data_need_not_move() -> None:
    assert not needs_transfer(TP4, TP4)
    assert needs_transfer(TP4, Placement(ALL, Strategy(dp=4)))
    assert needs_transfer(Placement(LEFT, Strategy(tp=2)), Placement(RIGHT, Strategy(tp=2)))
    assert needs_transfer(TP4, Placement(ALL, Strategy(pp=4)))


def test_orders_are_checked() -> None:
    graph = augment(small_graph(), {"gen": TP4, "score": TP4, "train": TP4})
    graph.check_order(["gen", "score", "train"], "plan")
    for order, expected in [
        (["gen", "train", "score"], "runs train before score"),
        (["gen", "score"], "lacks 'train'"),
        (["gen", "score", "train", "test"], "unknown node 'test'"),
        (["gen", "gen", "score", "train"], "has a node twice"),
        ([], "lacks 'gen'"),
    ]:
        with pytest.raises(PlanError, match="^plan: the order ") as caught:
            graph.check_order(order, "plan")
        assert expected in str(caught.value)
