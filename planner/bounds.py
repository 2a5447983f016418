"""Seconds per iteration that no plan can go below.

Search deepens upper bounds; this module is where proofs go.
"""

from __future__ import annotations

from planner.precedence import Precedence, exact_period, rank_arcs
from planner.problem import Problem


def lower_bound_s(problem: Problem) -> float:
    """A valid lower bound on the steady seconds per iteration over all choices of candidates.

    The greater of two:

    Dependencies: the period of the dataflow graph with every call at its fastest candidate, no
    transfers or reallocations, and GPUs for all calls at once. Any plan's graph has these nodes with
    at least these seconds, and paths at least as long between them; shorter seconds and fewer
    constraints never make the greatest cycle ratio larger.

    GPU-seconds: within a period T every GPU works at most T, and no call takes more than T, so
    the sum over calls of the least (seconds x GPUs) among candidates of at most T seconds is at most
    T x GPUs. The bound is the least T for which that holds.
    """
    return max(dependency_bound_s(problem), capacity_bound_s(problem))


def dependency_bound_s(problem: Problem) -> float:
    """The first of the two bounds."""
    graph = problem.graph
    names = [call.name for call in graph.calls]
    fastest = [min(row[0] for row in rows) for rows in problem.rows]
    order = problem.call_order
    at = {names[call]: i for i, call in enumerate(order)}
    edges = [(at[src], at[dst], 0) for src, dst in graph.data_edges()]
    for role in graph.roles:
        trainer = graph.maker(role)
        for call in graph.calls_of(role) if trainer else ():
            if trainer is not None and call.name != trainer.name:
                edges.append((at[trainer.name], at[call.name], 1))
    count = len(order)
    # every call occupies its own GPUs: it also waits for itself in the iteration before
    arcs = rank_arcs(Precedence.of(count, edges), range(count), [1 << i for i in range(count)])
    return exact_period(arcs, [fastest[call] for call in order])


def capacity_bound_s(problem: Problem) -> float:
    """The second of the two bounds."""
    num_gpus = problem.cluster.num_gpus
    options = [sorted({(row[0], row[0] * (row[2] - row[1])) for row in rows}) for rows in problem.rows]
    # the least area is a step function of T that falls at candidates' seconds
    steps = sorted({seconds for table in options for seconds, _ in table})
    start = max(table[0][0] for table in options)
    least = [float("inf")] * len(options)
    position = [0] * len(options)
    bound = start
    for index, step in enumerate(steps):
        for i, table in enumerate(options):
            while position[i] < len(table) and table[position[i]][0] <= step:
                least[i] = min(least[i], table[position[i]][1])
                position[i] += 1
        if step < start:
            continue
        needed = sum(least) / num_gpus
        bound = max(step, needed)
        following = steps[index + 1] if index + 1 < len(steps) else float("inf")
        if needed < following:
            return bound
    return bound
