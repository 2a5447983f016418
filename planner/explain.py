"""Why a plan is as it is: what else each call could have got, and what memory has forced.

Decides which questions a plan is asked; `planner.explain_text` words the answers. The plan may be
searched or written by hand: nothing but its placements and its order counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from planner.alternatives import runners_up
from planner.assess import Assessment, CallTime
from planner.budget import reasons
from planner.candidates import Candidate, CandidateSet, build_candidates
from planner.options import Option
from planner.problem import Choice, Problem
from planner.result import Alternative, SearchResult
from planner.search import methods
from realloc.augmented import Placement
from realloc.clauses import Clauses
from realloc.errors import InfeasibleError
from realloc.plan import ExecutionPlan

ANY_MEMORY_BYTES = 1 << 20 << 30
"""A million GiB: as much as any call could want."""
GAIN = 1e-4
"""An iteration must get shorter by this share for a gain to be worth telling."""


@dataclass(frozen=True)
class Gain:
    """Another placement of one call that would shorten the iteration, all else but the order as it is."""

    placement: Placement
    iteration_s: float
    peak_bytes: int
    order: tuple[str, ...]


@dataclass(frozen=True)
class CallExplanation:
    """`constraints`: what the experiment says of it. `next_best`: the best other placement of this call
    alone. `with_memory`: the best one if memory had no end. `overlooked`: a faster one that fits, where
    the plan is not the best of its neighbours."""

    name: str
    placement: Placement
    time: CallTime
    own_bytes: int
    critical: bool
    shares_gpus_with: tuple[str, ...]
    constraints: tuple[str, ...]
    next_best: Alternative | None
    with_memory: Gain | None
    overlooked: Gain | None


@dataclass(frozen=True)
class Explanation:
    """`everywhere`: plans with all calls on all GPUs, to compare with. `without_memory_s`: an iteration of
    the best plan found when memory had no end, None where that was not searched. `note`: what could not
    be looked at, and why."""

    assessment: Assessment
    calls: tuple[CallExplanation, ...]
    everywhere: tuple[Alternative, ...]
    without_memory_s: float | None
    without_memory_bytes: int
    note: str = ""


def explain(plan: ExecutionPlan, time_limit_s: float = 10.0) -> Explanation:
    """Looks for better and next best placements for about `time_limit_s`, making candidates aside.

    With 0 it looks for none. Raises InputError for an unknown device.
    """
    assessment = Assessment(plan)
    if time_limit_s <= 0:
        calls = tuple(_call(assessment, call.name, (), None, None) for call in plan.graph.calls)
        return Explanation(assessment, calls, (), None, 0, "Other placements were not looked for.")
    part_s = time_limit_s / 4
    note = ""
    alternatives: tuple[Alternative, ...] = ()
    overlooked: dict[str, Gain | None] = {}
    gains: dict[str, Gain | None] = {}
    best: SearchResult | None = None
    try:
        problem, choice = problem_with(plan, assessment, assessment.capacity_bytes)
        found = runners_up(problem, choice, assessment.iteration_s, time.monotonic() + part_s)
        alternatives = tuple(_with_reasons(assessment, item) for item in found)
        overlooked = _gains(problem, choice, assessment.iteration_s, time.monotonic() + part_s)
    except InfeasibleError as error:
        note = f"No other plan can be looked for: {error}"
    try:
        free, free_choice = problem_with(plan, assessment, ANY_MEMORY_BYTES)
        gains = _gains(free, free_choice, assessment.iteration_s, time.monotonic() + part_s)
        best = methods()["auto"](free, part_s, 0)
    except InfeasibleError as error:  # for reasons other than memory
        note = f"No other plan can be looked for: {error}"
    return Explanation(
        assessment=assessment,
        calls=tuple(
            _call(assessment, call.name, alternatives, overlooked.get(call.name), gains.get(call.name))
            for call in plan.graph.calls
        ),
        everywhere=tuple(item for item in alternatives if item.call is None),
        without_memory_s=None if best is None else best.iteration_s,
        without_memory_bytes=0 if best is None else best.memory.total_bytes,
        note=note,
    )


def _gains(problem: Problem, choice: Choice, iteration_s: float, deadline: float) -> dict[str, Gain | None]:
    found = {}
    for index, call in enumerate(problem.graph.calls):
        now = time.monotonic()
        until = now + (deadline - now) / (len(choice) - index)
        found[call.name] = _best_gain(problem, choice, index, iteration_s, until)
    return found


def _call(
    assessment: Assessment,
    name: str,
    alternatives: tuple[Alternative, ...],
    overlooked: Gain | None,
    gain: Gain | None,
) -> CallExplanation:
    plan = assessment.plan
    mine = plan.placements[name]
    memory = assessment.call_memory[name]
    clauses = Clauses(plan.experiment.constraints, plan.graph, plan.cluster)
    if gain is not None:  # search adds up stages that need not be on one GPU
        moved = replace(plan, placements={**plan.placements, name: gain.placement}, order=gain.order)
        gain = replace(gain, peak_bytes=Assessment(moved, assessment.costs).memory.total_bytes)
        if gain.peak_bytes <= assessment.capacity_bytes:  # nothing that memory forbids
            overlooked = min((gain, overlooked or gain), key=lambda item: item.iteration_s)
            gain = None
    if gain is not None and overlooked is not None and overlooked.iteration_s <= gain.iteration_s:
        gain = None
    return CallExplanation(
        name=name,
        placement=mine,
        time=assessment.call_time(name),
        own_bytes=memory.parameters + memory.gradients + memory.optimizer + sum(memory.working.values()),
        critical=name in assessment.simulation.critical,
        shares_gpus_with=tuple(
            other for other, p in plan.placements.items() if other != name and p.mesh.overlaps(mine.mesh)
        ),
        constraints=tuple(clause.text for clause in clauses.of(name)),
        next_best=next((item for item in alternatives if item.call == name), None),
        with_memory=gain,
        overlooked=overlooked,
    )


def _with_reasons(assessment: Assessment, item: Alternative) -> Alternative:
    """Says what it loses by as comparisons do: by all GPUs' time."""
    if item.iteration_s is None or item.iteration_s <= assessment.iteration_s:
        return item
    plan = replace(assessment.plan, placements=item.placements, order=item.order)
    other = Assessment(plan, assessment.costs)
    return replace(item, why="; ".join(reasons(assessment, other, most=3)) or item.why)


def problem_with(plan: ExecutionPlan, assessment: Assessment, capacity_bytes: int) -> tuple[Problem, Choice]:
    """The problem that the plan answers, the plan's own placements among the candidates.

    Raises InfeasibleError when a call fits nowhere.
    """
    graph, costs = plan.graph, assessment.costs
    made = build_candidates(plan.experiment, graph, plan.cluster, costs, capacity_bytes)
    candidates = dict(made.candidates)
    for name, placement in plan.placements.items():
        known = candidates[name]
        if not any(candidate.placement == placement for candidate in known):
            alone_s = costs.call_s(graph.by_name[name], placement)
            option = Option(placement.strategy, alone_s, assessment.call_memory[name])
            more = [*known, Candidate(placement, option)]
            candidates[name] = sorted(more, key=lambda candidate: candidate.option.seconds)
    every = CandidateSet(candidates, made.rejections)
    found = Problem(plan.experiment, graph, plan.cluster, costs, every, capacity_bytes)
    choice = tuple(
        next(i for i, candidate in enumerate(row) if candidate.placement == plan.placements[call.name])
        for call, row in zip(found.graph.calls, found.candidates, strict=True)
    )
    return found, choice


def _best_gain(
    problem: Problem, choice: Choice, call: int, iteration_s: float, deadline: float
) -> Gain | None:
    """The placement of one call that shortens the iteration most, all else as it is."""
    limit, found = iteration_s * (1 - GAIN), None
    for index, candidate in enumerate(problem.candidates[call]):
        if candidate.option.seconds >= limit or time.monotonic() > deadline:
            break  # candidates are sorted: all that follow take longer alone
        changed = (*choice[:call], index, *choice[call + 1 :])
        seconds = problem.evaluate(changed, limit, hasty=True)
        if seconds < limit:
            limit, found = seconds, changed
    if found is None:
        return None
    placement = problem.candidates[call][found[call]].placement
    return Gain(placement, limit, problem.peak_bytes(found), problem.schedule(found).order)
