"""The augmented graph of a choice as numbers, and the order in which its nodes take least time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from planner.precedence import Precedence, list_schedule, rank_arcs
from planner.simulator import period_s, steady_state
from realloc.augmented import AugmentedGraph, Residence


@dataclass(frozen=True)
class Schedule:
    """One evaluated choice in terms of the augmented graph."""

    period_s: float
    order: tuple[str, ...]
    node_s: Mapping[str, float]


@dataclass(frozen=True)
class Structure:
    """The augmented graph of all choices that need the same transfers and reallocations.

    `slots[i]` says what node i is: a call (its index), a transfer (edge index + number of calls), or
    a reallocation (call index + number of calls + number of edges); loads, offloads and offloads of
    parameters follow, each block with one slot for every call. `graph`: of a choice with offload.
    """

    slots: tuple[int, ...]
    precedence: Precedence
    graph: AugmentedGraph | None = None
    absent: tuple[Residence, ...] = ()


def steady_s(structure: Structure, seconds: Sequence[float], masks: Sequence[int]) -> float:
    """Steady seconds per iteration in the order of a list schedule."""
    order, ends = list_schedule(structure.precedence, seconds, masks)
    arcs = rank_arcs(structure.precedence, order, masks)
    return steady_state(order, arcs, seconds, ends).period_s


def best_order(
    structure: Structure,
    seconds: Sequence[float],
    masks: Sequence[int],
    fits: Callable[[Sequence[str]], bool],
    limit_s: float = inf,
    *,
    overlaps_loads: bool,
) -> tuple[float, tuple[str, ...]]:
    """Seconds and order of a choice with offload: loads ahead of time where that fits and helps.

    (inf, order) when it does not fit, or not below the limit.
    """
    graph = structure.graph
    assert graph is not None
    names = graph.default_order()
    node_s = dict(zip(names, seconds, strict=True))
    numbers, _ = list_schedule(structure.precedence, seconds, masks)
    order = graph.place_copies(names[i] for i in numbers)
    best_s, best = inf, order
    for placed in (order, graph.place_copies(order, ahead=True)) if overlaps_loads else (order,):
        spent = period_s(graph, node_s, placed, overlaps_loads=overlaps_loads)
        if spent < min(best_s, limit_s) and fits(placed):
            best_s, best = spent, placed
    return best_s, best
