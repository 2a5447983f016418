"""Why the runners-up lost: the best plans that differ from the chosen one in a way people ask about."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import inf

from planner.options import gib
from planner.problem import Choice, Problem
from planner.result import Alternative
from realloc.augmented import Placement

GRACE_S = 2.0


def runners_up(problem: Problem, best: Choice, best_s: float, deadline: float) -> tuple[Alternative, ...]:
    """The best other placement of each call, and the plans that put every call on all GPUs.

    A placement counts as other when its mesh size or its degrees differ. `deadline` (as
    `time.monotonic`) cuts the search for alternatives, with GRACE_S on top.
    """
    found = []
    for call in range(len(best)):
        left_s = deadline + GRACE_S - time.monotonic()
        if left_s < 0:
            break
        # no call may take the time of those after it
        choice = _best_other(problem, best, call, time.monotonic() + left_s / (len(best) - call))
        name = problem.graph.calls[call].name
        if choice is not None:
            placed = problem.candidates[call][choice[call]].placement
            found.append(_alternative(problem, best, best_s, choice, f"{name} on {placed}", name))
        elif crowded := _crowded(problem, best, call, name):
            found.append(crowded)
    symmetric = _everywhere(problem, same=True)
    if symmetric is not None:
        found.append(
            _alternative(problem, best, best_s, symmetric, "all GPUs, one strategy for all calls", None)
        )
    each = _everywhere(problem, same=False)
    if each is not None and each != symmetric:
        found.append(
            _alternative(problem, best, best_s, each, "all GPUs, each call's own best strategy", None)
        )
    return tuple(found)


def _best_other(problem: Problem, best: Choice, call: int, deadline: float) -> Choice | None:
    chosen = problem.candidates[call][best[call]].placement
    limit, found = inf, None
    for index, candidate in enumerate(problem.candidates[call]):
        if candidate.option.seconds >= limit or time.monotonic() > deadline:
            break  # candidates are sorted: all that follow take longer alone
        if _kind(candidate.placement) == _kind(chosen):
            continue
        choice = (*best[:call], index, *best[call + 1 :])
        seconds = problem.evaluate(choice, limit, hasty=True)
        if seconds < limit:
            limit, found = seconds, choice
    return found


def _crowded(problem: Problem, best: Choice, call: int, name: str) -> Alternative | None:
    """Of a call's other placements, if none fits beside the other calls, the smallest."""
    chosen = _kind(problem.candidates[call][best[call]].placement)
    others = [
        (*best[:call], index, *best[call + 1 :])
        for index, candidate in enumerate(problem.candidates[call])
        if _kind(candidate.placement) != chosen
    ]
    if not others:
        return None
    choice = min(others, key=lambda other: (problem.peak_bytes(other), other))
    peak = problem.peak_bytes(choice)
    if peak <= problem.capacity_bytes:  # there was no time to find it
        return None
    why = f"the smallest makes {gib(peak)} a GPU with the other calls"
    return Alternative(f"{name} elsewhere", name, problem.placements(choice), None, peak, why)


def _kind(placement: Placement) -> tuple[int, int, int]:
    strategy = placement.strategy
    return strategy.dp, strategy.tp, strategy.pp


def _everywhere(problem: Problem, *, same: bool) -> Choice | None:
    """The best plan with every call on all GPUs; None when a call has no candidate there.

    `same`: all calls that have a model share their degrees; otherwise each call takes its fastest.
    A plan that does not fit in memory is returned when no such plan fits.
    """
    whole = problem.cluster.num_gpus
    by_degrees: dict[tuple[int, int, int], list[int | None]] = {}
    fastest: list[int] = []
    for i, candidates in enumerate(problem.candidates):
        here = [k for k, c in enumerate(candidates) if c.placement.mesh.size == whole]
        if not here:
            return None
        fastest.append(here[0])
        for k in here:
            row = by_degrees.setdefault(_kind(candidates[k].placement), [None] * len(problem.candidates))
            if row[i] is None:
                row[i] = k
    if not same:
        return tuple(fastest)
    calls = problem.graph.calls
    options: list[tuple[bool, float, Choice]] = []
    for row in by_degrees.values():
        filled = [fastest[i] if k is None and calls[i].role is None else k for i, k in enumerate(row)]
        if all(k is not None for k in filled):
            choice = tuple(k for k in filled if k is not None)
            options.append((problem.overflow_bytes(choice) > 0, problem.schedule(choice).period_s, choice))
    return min(options)[2] if options else None


def _alternative(
    problem: Problem, best: Choice, best_s: float, choice: Choice, name: str, call: str | None
) -> Alternative:
    peak = problem.peak_bytes(choice)
    placements = problem.placements(choice)
    if peak > problem.capacity_bytes:
        why = f"needs {gib(peak)} a GPU, {gib(problem.capacity_bytes)} may be used"
        return Alternative(name, call, placements, None, peak, why)
    schedule = problem.schedule(choice)
    why = difference(problem.schedule(best).node_s, schedule.node_s, schedule.period_s - best_s)
    return Alternative(name, call, placements, schedule.period_s, peak, why, schedule.order)


def difference(best: Mapping[str, float], other: Mapping[str, float], slower_s: float) -> str:
    """The nodes that take longer than in the best plan, most first; what is left is waiting."""
    longer = {name: seconds - best.get(name, 0.0) for name, seconds in other.items()}
    saved = {name: seconds for name, seconds in best.items() if name not in other}
    longer.update({name: -seconds for name, seconds in saved.items()})
    threshold = max(0.02 * slower_s, 1e-9)
    parts = [
        f"{name} {seconds:+.3g} s"
        for name, seconds in sorted(longer.items(), key=lambda item: -item[1])
        if seconds > threshold
    ]
    if slower_s <= 1e-9:
        return "no slower: equal by this cost model"
    if not parts:
        return "no node is slower, but calls wait for each other's GPUs"
    return ", ".join(parts[:3])
