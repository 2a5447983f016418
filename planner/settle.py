"""The last step of a search on a host with fewer cores than ranks: down to where no neighbour is faster.

Search prices every call as if the rest of its host were idle, so that prices can be looked up. Beside
each other calls take longer (`planner.contention`), and a plan that kept the host busy may lose against
one that did not. So the best other placements are simulated as they would run, and the fastest is taken,
until none is faster. Where every rank has a core nothing changes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from cost_models.model import CostModel
from planner.alternatives import difference, runners_up
from planner.contention import Shared, simulate_shared
from planner.memory import causes_of, worst_gpu
from planner.problem import Choice, Problem
from planner.result import Alternative, SearchResult
from realloc.augmented import augment

_ROUNDS = 8


@dataclass(frozen=True)
class _Settled:
    choice: Choice
    shared: Shared
    runners_up: tuple[Alternative, ...]


def settle(problem: Problem, costs: CostModel, result: SearchResult, time_limit_s: float) -> SearchResult:
    """The result of the plan that is fastest among its neighbours on shared cores.

    `time_limit_s` bounds the look at neighbours. What was proven stays a bound, for beside others no call
    takes less time than alone.
    """
    if not costs.shares_cores:
        return result
    found = _descend(problem, costs, result, time.monotonic() + time_limit_s)
    placements, order = problem.placements(found.choice), problem.schedule(found.choice).order
    memory = problem.memory(found.choice)
    as_searched = found.shared.simulation.iteration_s <= result.iteration_s * (1 + 1e-6)
    return replace(
        result,
        plan=replace(result.plan, placements=placements, order=order),
        simulation=found.shared.simulation,
        memory=worst_gpu(problem.graph, placements, memory, order),
        call_bytes={name: causes_of(m) for name, m in memory.items()},
        proven=result.proven and as_searched,
        runners_up=found.runners_up,
    )


def _descend(problem: Problem, costs: CostModel, result: SearchResult, deadline: float) -> _Settled:
    choice, listed = _choice_of(problem, result), result.runners_up
    for _ in range(_ROUNDS):
        shared = _shared(problem, costs, choice)
        best_s = shared.simulation.iteration_s
        others = [_as_it_runs(problem, costs, item, shared) for item in listed]
        found = _Settled(choice, shared, tuple(others))
        faster = [
            item for item in others if item.iteration_s is not None and item.iteration_s < best_s * 0.999
        ]
        if not faster:
            break
        fastest = min(faster, key=lambda item: item.iteration_s or 0.0)
        choice = _choice_of(problem, fastest)
        listed = runners_up(problem, choice, fastest.iteration_s or best_s, deadline)
    return found


def _as_it_runs(problem: Problem, costs: CostModel, item: Alternative, best: Shared) -> Alternative:
    """The alternative with its seconds on shared cores, and what it loses by there."""
    if item.iteration_s is None:
        return item
    shared = _shared(problem, costs, _choice_of(problem, item))
    slower_s = shared.simulation.iteration_s - best.simulation.iteration_s
    why = difference(best.node_s, shared.node_s, slower_s)
    return replace(item, iteration_s=shared.simulation.iteration_s, why=why)


def _shared(problem: Problem, costs: CostModel, choice: Choice) -> Shared:
    schedule = problem.schedule(choice)
    augmented = augment(problem.graph, problem.placements(choice))
    per_node = problem.cluster.gpus_per_node
    return simulate_shared(augmented, schedule.node_s, schedule.order, costs, per_node)


def _choice_of(problem: Problem, given: Alternative | SearchResult) -> Choice:
    """The candidates that these placements are."""
    placements = given.plan.placements if isinstance(given, SearchResult) else given.placements
    return tuple(
        next(k for k, c in enumerate(candidates) if c.placement == placements[call.name])
        for call, candidates in zip(problem.graph.calls, problem.candidates, strict=True)
    )
