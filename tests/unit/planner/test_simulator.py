"""The simulator against cases worked out by hand and against a slow one that shares no code with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulator import list_order, simulate
from realloc.augmented import AugmentedGraph, Edge, Node, NodeKind
from realloc.errors import PlanError


def node(name: str, *ranks: int) -> Node:
    return Node(name, NodeKind.CALL, ranks)


def test_chain_on_one_rank_takes_the_sum():
    graph = AugmentedGraph((node("a", 0), node("b", 0)), (Edge("a", "b"),))
    result = simulate(graph, {"a": 2.0, "b": 3.0})
    assert result.iteration_s == 5.0
    assert result.start_s == {"a": 0.0, "b": 2.0}
    assert result.critical == ("a", "b")
    assert [(item.ranks, item.busy_s) for item in result.busy] == [((0,), 5.0)]


def test_disjoint_meshes_overlap():
    graph = AugmentedGraph(
        (node("a", 0, 1), node("b", 0), node("c", 1), node("d", 0, 1)),
        (Edge("a", "b"), Edge("a", "c"), Edge("b", "d"), Edge("c", "d")),
    )
    result = simulate(graph, {"a": 1.0, "b": 4.0, "c": 2.0, "d": 1.0})
    assert result.iteration_s == 6.0
    assert result.start_s == {"a": 0.0, "b": 1.0, "c": 1.0, "d": 5.0}
    assert {item.ranks: item.busy_s for item in result.busy} == {(0,): 6.0, (1,): 4.0}


def test_without_version_edges_iterations_overlap_like_a_pipeline():
    graph = AugmentedGraph((node("a", 0), node("b", 1)), (Edge("a", "b"),))
    assert simulate(graph, {"a": 2.0, "b": 3.0}).iteration_s == 3.0


def test_a_lag_edge_makes_the_next_iteration_wait():
    graph = AugmentedGraph((node("a", 0), node("b", 1)), (Edge("a", "b"), Edge("b", "a", lag=1)))
    assert simulate(graph, {"a": 2.0, "b": 3.0}).iteration_s == 5.0


def test_a_lag_of_two_halves_the_wait():
    graph = AugmentedGraph((node("a", 0), node("b", 1)), (Edge("a", "b"), Edge("b", "a", lag=2)))
    assert simulate(graph, {"a": 3.0, "b": 3.0}).iteration_s == pytest.approx(3.0)
    result = simulate(graph, {"a": 1.0, "b": 4.0})
    assert result.iteration_s == pytest.approx(4.0)
    deep = AugmentedGraph(
        (node("a", 0), node("b", 1), node("c", 2)),
        (Edge("a", "b"), Edge("b", "c"), Edge("c", "a", lag=2)),
    )
    assert simulate(deep, {"a": 3.0, "b": 3.0, "c": 3.0}).iteration_s == pytest.approx(4.5)
    assert simulate(deep, {"a": 3.0, "b": 3.0, "c": 3.0}).critical_iterations == 2


def test_reallocation_occupies_both_ends():
    # train (rank 1) -> move (0, 1) -> gen (0) of the next iteration; other work on rank 0 delays it
    graph = AugmentedGraph(
        (node("gen", 0), node("train", 1), node("eval", 0), node("move", 0, 1)),
        (Edge("gen", "train"), Edge("gen", "eval"), Edge("train", "move"), Edge("gen", "move"),
         Edge("move", "gen", lag=1)),
    )  # fmt: skip
    seconds = {"gen": 2.0, "train": 3.0, "eval": 1.0, "move": 0.5}
    assert simulate(graph, seconds).iteration_s == 5.5
    assert simulate(graph, {**seconds, "eval": 4.0}).iteration_s == 6.5
    # the same with the move before eval: rank 0 waits for train first
    order = ("gen", "train", "move", "eval")
    late = simulate(graph, {**seconds, "eval": 4.0}, order)
    assert late.iteration_s == 9.5


def test_what_the_next_iteration_waits_for_goes_first():
    graph = AugmentedGraph(
        (node("gen", 0), node("critic", 0, 1), node("actor", 0, 1)),
        (Edge("gen", "critic"), Edge("gen", "actor"), Edge("actor", "gen", lag=1)),
    )
    order = list_order(graph, {"gen": 1.0, "critic": 1.0, "actor": 1.0})
    assert order == ("gen", "actor", "critic")


def test_a_wrong_order_is_refused():
    graph = AugmentedGraph((node("a", 0), node("b", 0)), (Edge("a", "b"),))
    with pytest.raises(PlanError, match="runs b before a"):
        simulate(graph, {"a": 1.0, "b": 1.0}, ("b", "a"))


def test_a_thousand_ranks_are_a_few_classes():
    graph = AugmentedGraph(
        (Node("a", NodeKind.CALL, tuple(range(1024))), Node("b", NodeKind.CALL, tuple(range(512)))),
        (Edge("a", "b"),),
    )
    result = simulate(graph, {"a": 1.0, "b": 2.0})
    assert result.iteration_s == 3.0
    assert [(len(item.ranks), item.busy_s) for item in result.busy] == [(512, 3.0), (512, 1.0)]


@st.composite
def graphs(draw) -> tuple[AugmentedGraph, Mapping[str, float]]:
    count = draw(st.integers(1, 7))
    ranks = [draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)) for _ in range(count)]
    edges = []
    for a in range(count):
        for b in range(count):
            kind = draw(st.integers(0, 5))
            if kind == 0 and a < b:
                edges.append(Edge(str(a), str(b)))
            elif kind == 1:
                edges.append(Edge(str(a), str(b), lag=draw(st.integers(1, 2))))
    seconds = {
        str(i): draw(st.one_of(st.integers(0, 9), st.floats(0, 10, allow_subnormal=False)))
        for i in range(count)
    }
    nodes = tuple(node(str(i), *sorted(ranks[i])) for i in range(count))
    return AugmentedGraph(nodes, tuple(edges)), seconds


def slow_ends(
    graph: AugmentedGraph, seconds: Mapping[str, float], order: Sequence[str], iterations: int
) -> list[dict[str, float]]:
    """Every rank's clock, one node at a time."""
    clock = dict.fromkeys((rank for n in graph.nodes for rank in n.ranks), 0.0)
    ends: list[dict[str, float]] = []
    for t in range(iterations):
        ends.append({})
        for name in order:
            ranks = graph.by_name[name].ranks
            start = max(clock[rank] for rank in ranks)
            for edge in graph.edges:
                if edge.dst == name and t - edge.lag >= 0:
                    start = max(start, ends[t - edge.lag][edge.src])
            ends[t][name] = start + seconds[name]
            for rank in ranks:
                clock[rank] = ends[t][name]
    return ends


def greatest_cycle_ratio(graph: AugmentedGraph, seconds: Mapping[str, float], order: Sequence[str]) -> float:
    """By enumeration of all simple cycles."""
    arcs: dict[tuple[str, str], int] = {}

    def add(src: str, dst: str, lag: int) -> None:
        arcs[src, dst] = min(lag, arcs.get((src, dst), lag))

    for edge in graph.edges:
        add(edge.src, edge.dst, edge.lag)
    position = {name: i for i, name in enumerate(order)}
    for a in graph.nodes:
        for b in graph.nodes:
            if set(a.ranks) & set(b.ranks):
                add(a.name, b.name, 0 if position[a.name] < position[b.name] else 1)
    best = 0.0
    for cycle in nx.simple_cycles(nx.DiGraph(list(arcs))):
        lags = sum(arcs[a, b] for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        best = max(best, sum(seconds[name] for name in cycle) / lags)
    return best


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_period_equals_that_of_a_slow_simulator(problem):
    graph, seconds = problem
    order = list_order(graph, seconds)
    result = simulate(graph, seconds, order)
    exact = greatest_cycle_ratio(graph, seconds, order)
    assert result.iteration_s == pytest.approx(exact, rel=1e-6, abs=1e-9)
    # long runs of the slow simulator grow by the same time
    ends = slow_ends(graph, seconds, order, 120)
    growth = (max(ends[119].values()) - max(ends[59].values())) / 60
    assert growth == pytest.approx(exact, abs=sum(seconds.values()) / 30 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_never_faster_than_any_rank_or_the_critical_cycle(problem):
    graph, seconds = problem
    result = simulate(graph, seconds)
    slack = 1e-9 + 1e-6 * result.iteration_s
    for item in result.busy:
        assert result.iteration_s >= item.busy_s - slack
    for rank in {rank for n in graph.nodes for rank in n.ranks}:
        members = [item for item in result.busy if rank in item.ranks]
        assert len(members) == 1
        busy = sum(seconds[n.name] for n in graph.nodes if rank in n.ranks)
        assert members[0].busy_s == pytest.approx(busy)
    if result.iteration_s > 1e-6:
        total = sum(seconds[name] for name in result.critical)
        assert total == pytest.approx(result.iteration_s * result.critical_iterations, rel=1e-4, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_the_order_is_that_of_the_start_times_of_the_first_iteration(problem):
    graph, seconds = problem
    order = list_order(graph, seconds)
    graph.check_order(order, "test")
    ends = slow_ends(graph, seconds, order, 1)[0]
    starts = [ends[name] - seconds[name] for name in order]
    assert starts == sorted(starts) or starts == pytest.approx(sorted(starts))
