"""Calls that share a host's cores, by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from planner.contention import simulate_shared
from realloc.augmented import Placement, augment
from realloc.dataflow import Call, CallKind, DataflowGraph, Output
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy
from tests.unit.planner.problems import keys


@dataclass(frozen=True)
class OneCore:
    """A host on which n ranks take n times as long; or one with a core for each."""

    shares_cores: bool = True
    overlaps_host_copies: bool = False

    def slowdown_beside(self, own: int, busy: float) -> float:
        return busy / own


def two_calls(ranks: tuple[int, int]) -> dict[str, Placement]:
    return {
        name: Placement(DeviceMesh(rank, 1, 2), Strategy())
        for name, rank in zip(("left", "right"), ranks, strict=True)
    }


def graph() -> DataflowGraph:
    def infer(name: str, role: str) -> Call:
        return Call(name, CallKind.INFERENCE, ("tokens",), (name,), role, "tokens", Output.SCORES)

    return DataflowGraph(
        calls=(infer("left", "a"), infer("right", "b")),
        keys=keys("tokens", "left", "right"),
        source_keys=("tokens",),
    )


@pytest.mark.parametrize(
    ("ranks", "shares", "expected"),
    [
        ((0, 1), True, 4.0),  # 1 s and 3 s of work on one core
        ((0, 1), False, 3.0),  # a core for each
        ((0, 0), True, 4.0),  # one after the other: nothing runs beside them
    ],
)
def test_one_core_does_the_work_of_both(ranks: tuple[int, int], shares: bool, expected: float):
    augmented = augment(graph(), two_calls(ranks))
    work = {"left": 1.0, "right": 3.0}
    node_s = {node.name: work.get(node.name, 0.0) for node in augmented.nodes}
    shared = simulate_shared(augmented, node_s, None, OneCore(shares_cores=shares), 2)
    assert shared.simulation.iteration_s == pytest.approx(expected, rel=0.02)


def test_other_hosts_do_not_matter():
    augmented = augment(graph(), two_calls((0, 1)))
    node_s = {node.name: 1.0 for node in augmented.nodes}
    assert simulate_shared(augmented, node_s, None, OneCore(), 1).simulation.iteration_s == pytest.approx(1.0)
