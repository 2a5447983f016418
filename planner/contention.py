"""Calls that share the cores of a host: each takes longer while others run beside it.

A call is priced as if the rest of its host were idle. Where a host has fewer cores than ranks, calls
on disjoint meshes that run at the same time slow each other down. How much depends on when they run,
and when they run on how long they take: a fixed point, approached from the prices by themselves.
On GPUs, and on hosts with a core for every rank, nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from typing import Protocol

from cost_models.model import CostModel
from planner.simulator import Simulation, simulate
from realloc.augmented import AugmentedGraph, NodeKind
from realloc.plan import ExecutionPlan

_ROUNDS = 12
_CLOSE = 1e-3


class SharedHosts(Protocol):
    """What is asked of a cost model."""

    @property
    def overlaps_host_copies(self) -> bool: ...

    @property
    def shares_cores(self) -> bool: ...

    def slowdown_beside(self, own: int, busy: float) -> float: ...


@dataclass(frozen=True)
class Shared:
    """The steady state, and the seconds that nodes take in it."""

    simulation: Simulation
    node_s: Mapping[str, float]


def simulate_shared(
    augmented: AugmentedGraph,
    node_s: Mapping[str, float],
    order: Sequence[str] | None,
    costs: SharedHosts,
    per_node: int,
) -> Shared:
    """As `simulator.simulate`, with every call as slow as those that run beside it make it.

    `node_s`: seconds of every node by itself. `per_node`: ranks of a host.
    """
    overlaps = costs.overlaps_host_copies
    simulation = simulate(augmented, node_s, order, overlaps_loads=overlaps)
    if not costs.shares_cores:
        return Shared(simulation, node_s)
    ranks = {
        node.name: _by_host(node.ranks, per_node) for node in augmented.nodes if node.kind is NodeKind.CALL
    }
    factors = dict.fromkeys(ranks, 1.0)
    slowed = dict(node_s)
    for _ in range(_ROUNDS):
        found = {name: _factor(name, ranks, simulation, costs) for name in ranks}
        # halfway: a call that takes longer meets others, which would take longer then
        new = {name: (factors[name] + found[name]) / 2 for name in ranks}
        change = max((abs(new[name] - factors[name]) / factors[name] for name in ranks), default=0.0)
        factors = new
        slowed = {name: seconds * factors.get(name, 1.0) for name, seconds in node_s.items()}
        simulation = simulate(augmented, slowed, order, overlaps_loads=overlaps)
        if change < _CLOSE:
            break
    return Shared(simulation, slowed)


def _by_host(ranks: Sequence[int], per_node: int) -> Mapping[int, frozenset[int]]:
    hosts: dict[int, set[int]] = {}
    for rank in ranks:
        hosts.setdefault(rank // per_node, set()).add(rank)
    return {host: frozenset(members) for host, members in hosts.items()}


def _factor(
    name: str,
    ranks: Mapping[str, Mapping[int, frozenset[int]]],
    simulation: Simulation,
    costs: SharedHosts,
) -> float:
    """How much longer a call takes than by itself, on the host where most runs beside it."""
    worst = 1.0
    for host, own in ranks[name].items():
        beside: list[tuple[float, float, int]] = []
        for other, hosts in ranks.items():
            others = hosts.get(host, frozenset()) - own
            if other != name and others:
                beside += [(*window, len(others)) for window in _shared_windows(name, other, simulation)]
        worst = max(worst, _slowed(name, len(own), beside, simulation, costs))
    return worst


def _slowed(
    name: str,
    own: int,
    beside: Sequence[tuple[float, float, int]],
    simulation: Simulation,
    costs: SharedHosts,
) -> float:
    """The call's time over its work, while `beside` (from, to, ranks) run too."""
    start, end = simulation.start_s[name], simulation.end_s[name]
    if end <= start or not beside:
        return 1.0
    times = sorted({start, end, *(t for first, last, _ in beside for t in (first, last))})
    work = 0.0
    for first, last in pairwise(times):
        busy = own + sum(count for a, b, count in beside if a <= first and last <= b)
        work += (last - first) / costs.slowdown_beside(own, busy)
    return (end - start) / work


def _shared_windows(name: str, other: str, simulation: Simulation) -> Iterator[tuple[float, float]]:
    """When another call, of this iteration or another, runs beside a call."""
    start, end, period = simulation.start_s[name], simulation.end_s[name], simulation.iteration_s
    if period <= 0:
        return
    # calls that do not wait for each other may be many iterations apart
    nearest = floor((start - simulation.start_s[other]) / period)
    for lag in (nearest - 1, nearest, nearest + 1):
        first = max(start, simulation.start_s[other] + lag * period)
        last = min(end, simulation.end_s[other] + lag * period)
        if last > first:
            yield first, last


def call_terms(plan: ExecutionPlan, costs: CostModel, name: str, seconds: float) -> Mapping[str, float]:
    """Seconds of a call by term, which sum to `seconds`: those it takes beside others."""
    terms = costs.call_terms(plan.graph.by_name[name], plan.placements[name])
    alone = sum(terms.values())
    return {term: spent * seconds / alone for term, spent in terms.items()} if alone else terms
