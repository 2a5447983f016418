"""Calls that share the cores of a host: each takes longer while others run beside it.

A call is priced as if the rest of its host were idle. Where a host has fewer cores than ranks, calls
on disjoint meshes that run at the same time slow each other down. How much depends on when they run,
and when they run on how long they take: a fixed point, approached from the prices by themselves.
On GPUs, and on hosts with a core for every rank, nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        busy = float(len(own))
        for other, hosts in ranks.items():
            beside = hosts.get(host, frozenset()) - own
            if other != name and beside:
                busy += len(beside) * _shared_time(name, other, simulation)
        worst = max(worst, costs.slowdown_beside(len(own), busy))
    return worst


def _shared_time(name: str, other: str, simulation: Simulation) -> float:
    """The share of a call's time in which another runs too, of this iteration or of its neighbours."""
    start, end = simulation.start_s[name], simulation.end_s[name]
    if end <= start:
        return 0.0
    shared = 0.0
    for shift in (-simulation.iteration_s, 0.0, simulation.iteration_s):
        first, last = simulation.start_s[other] + shift, simulation.end_s[other] + shift
        shared += max(0.0, min(end, last) - max(start, first))
    return min(1.0, shared / (end - start))


def call_terms(plan: ExecutionPlan, costs: CostModel, name: str, seconds: float) -> Mapping[str, float]:
    """Seconds of a call by term, which sum to `seconds`: those it takes beside others."""
    terms = costs.call_terms(plan.graph.by_name[name], plan.placements[name])
    alone = sum(terms.values())
    return {term: spent * seconds / alone for term, spent in terms.items()} if alone else terms
