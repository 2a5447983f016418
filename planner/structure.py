"""The augmented graph of a choice as numbers, and the order in which its nodes take least time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from planner.precedence import Precedence, earliest_starts, list_schedule, rank_arcs
from planner.simulator import period_s, steady_state
from realloc.augmented import AugmentedGraph, Residence

MOST_ORDERS = 4


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
    parameters follow, each block with one slot for every call. `moves`: the
    reallocations. `graph`: of a choice with offload.
    """

    slots: tuple[int, ...]
    precedence: Precedence
    moves: tuple[int, ...] = ()
    graph: AugmentedGraph | None = None
    absent: tuple[Residence, ...] = ()


def steady_order(
    structure: Structure, seconds: Sequence[float], masks: Sequence[int]
) -> tuple[float, Sequence[int]]:
    """Steady seconds per iteration and an order that gives them, the best of a few.

    First the list schedule from a cold start, and that with reallocations as urgent as transfers: what
    the next iteration waits for before long calls. Neither knows that nodes of the iteration before may
    still run, and lets transfers wait for them while their other ranks could do something else.
    So the next orders are list schedules of an iteration that follows on the steady state of the order
    before, for as long as they are faster.
    """
    precedence, least = structure.precedence, busiest_s(seconds, masks)
    best_s: float = inf
    best: Sequence[int] = ()
    for urgent in ((), structure.moves) if structure.moves else ((),):
        order, ends = list_schedule(precedence, seconds, masks, urgent=urgent)
        steady = steady_state(order, rank_arcs(precedence, order, masks), seconds, ends)
        for _ in range(MOST_ORDERS):
            if steady.period_s < best_s:
                best_s, best = steady.period_s, order
            if best_s <= least * (1 + 1e-9):
                return best_s, best
            earliest = earliest_starts(precedence, masks, steady.ends, steady.period_s)
            other, _ = list_schedule(precedence, seconds, masks, earliest, urgent)
            if other == order:
                break
            order, before = other, steady.period_s
            steady = steady_state(order, rank_arcs(precedence, order, masks), seconds)
            if steady.period_s >= before * (1 - 1e-9):
                break
    return best_s, best


def busiest_s(seconds: Sequence[float], masks: Sequence[int]) -> float:
    """Seconds of the nodes of some rank that has most to do, of the first ranks of nodes."""
    most = 0.0
    for first in {mask & -mask for mask in masks}:
        busy = 0.0
        for spent, mask in zip(seconds, masks, strict=True):
            if mask & first:
                busy += spent
        most = max(most, busy)
    return most


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
