"""What all search methods share: the protocol, the record of a search, and its conclusion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Protocol

from planner.alternatives import runners_up
from planner.bounds import lower_bound_s
from planner.infeasible import describe_bytes, remedy
from planner.memory import causes_of, worst_gpu
from planner.options import gib
from planner.problem import Choice, Problem
from planner.result import Progress, SearchResult
from planner.simulator import simulate
from realloc.augmented import augment
from realloc.errors import InfeasibleError
from realloc.plan import ExecutionPlan, Predictions

Clock = Callable[[], float]
"""Seconds that time limits and histories count."""


class Method(Protocol):
    """Finds a plan. Deterministic for a seed; the time limit only cuts the search short.

    `clock`: seconds as they pass; benchmarks on busy machines may count those of the process alone.
    Raises InfeasibleError when it finds no plan that fits in memory.
    """

    def __call__(
        self, problem: Problem, time_limit_s: float, seed: int, *, clock: Clock = time.monotonic
    ) -> SearchResult: ...


class Record:
    """The best choice so far and when it was found."""

    def __init__(self, problem: Problem, time_limit_s: float, clock: Clock = time.monotonic) -> None:
        self.problem, self._clock = problem, clock
        self.best: Choice | None = None
        self.best_s = inf
        self.history: list[Progress] = []
        self._first_evaluation = problem.evaluated
        self._began = self._clock()
        self._deadline = self._began + time_limit_s
        self._least_overflow: tuple[int, Choice] | None = None
        self.bound_s = lower_bound_s(problem)
        # the same of all plans, also those with what a large cluster leaves out
        self.bound_of_all_s = 0.0
        self.interrupted = False

    @property
    def evaluated(self) -> int:
        return self.problem.evaluated - self._first_evaluation

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    @property
    def expired(self) -> bool:
        return self._clock() > self._deadline

    def evaluate(self, choice: Choice, limit_s: float = inf, *, hasty: bool = False) -> float:
        """As `Problem.evaluate`, and remembers the choice when it is the best so far."""
        seconds = self.problem.evaluate(choice, limit_s, hasty=hasty)
        if seconds < self.best_s:
            self.best, self.best_s = choice, seconds
            self.history.append(Progress(self.evaluated, self.elapsed_s, seconds))
        return seconds

    def raise_bound(self, bound_s: float) -> None:
        """Every plan was proven to take at least so long."""
        self.bound_s = max(self.bound_s, bound_s)

    def raise_bound_of_all(self, bound_s: float) -> None:
        """The same, also with what a large cluster leaves out; so of plans without it, too."""
        self.bound_of_all_s = max(self.bound_of_all_s, bound_s)
        self.raise_bound(bound_s)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, an interrupt (Ctrl-C) ends the search; what was found is kept, if anything was."""
        try:
            yield
        except KeyboardInterrupt:
            if self.best is None:
                raise
            self.interrupted = True

    def overflows(self, choice: Choice, over_bytes: int) -> None:
        """Remembers the choice that came nearest to fitting."""
        if self._least_overflow is None or over_bytes < self._least_overflow[0]:
            self._least_overflow = (over_bytes, choice)

    def conclude(self, method: str, *, proven: bool = False) -> SearchResult:
        """The result of the search. Raises InfeasibleError when nothing was found."""
        if self.best is None:
            raise self._infeasible()
        problem, best = self.problem, self.best
        elapsed_s, evaluated = self.elapsed_s, self.evaluated
        placements = problem.placements(best)
        schedule = problem.schedule(best)
        simulation = simulate(
            augment(problem.graph, placements),
            schedule.node_s,
            schedule.order,
            overlaps_loads=problem.costs.overlaps_host_copies,
        )
        peak = worst_gpu(problem.graph, placements, problem.memory(best), schedule.order)
        bound = self.best_s if proven else min(self.bound_s, self.best_s)
        is_whole = not any(problem.others)
        left_s = 0.0 if self.interrupted else self._deadline - self._clock()
        plan = ExecutionPlan(
            experiment=problem.experiment,
            cluster=problem.cluster,
            placements=placements,
            order=schedule.order,
            predictions=Predictions(
                iteration_s=simulation.iteration_s,
                tokens_per_s=tokens(problem) / max(simulation.iteration_s, 1e-12),
                node_s=schedule.node_s,
                peak_bytes={cause: size for cause, size in peak.by_cause.items() if size},
                costs=problem.costs.provenance,
                lower_bound_s=bound,
            ),
        )
        return SearchResult(
            method=method,
            plan=plan,
            simulation=simulation,
            memory=peak,
            call_bytes={name: causes_of(m) for name, m in problem.memory(best).items()},
            capacity_bytes=problem.capacity_bytes,
            lower_bound_s=bound,
            proven=proven or bound >= self.best_s * (1 - 1e-9),
            evaluated=evaluated,
            elapsed_s=elapsed_s,
            num_plans=problem.candidate_set.num_plans,
            bound_of_all_s=bound if is_whole else min(self.bound_of_all_s, bound),
            history=tuple(self.history),
            runners_up=runners_up(problem, best, self.best_s, time.monotonic() + left_s),
            rejections=problem.candidate_set.rejections,
            interrupted=self.interrupted,
        )

    def _infeasible(self) -> InfeasibleError:
        problem = self.problem
        capacity = gib(problem.capacity_bytes)
        if self._least_overflow is None:
            return InfeasibleError(
                f"no plan was found that fits into {capacity} a GPU; use more GPUs, fewer sequences, "
                f"or a longer time limit."
            )
        choice = self._least_overflow[1]
        peak = worst_gpu(problem.graph, problem.placements(choice), problem.memory(choice))
        return InfeasibleError(
            f"every call fits on its own, but no plan was found in which all fit together: the one that "
            f"comes nearest needs {gib(peak.total_bytes)} on GPU {peak.gpu} while {peak.call} runs "
            f"({describe_bytes(peak.by_cause)}), but only {capacity} may be used; "
            f"{remedy(peak.by_cause)}."
        )


def tokens(problem: Problem) -> float:
    """Prompt and response tokens of one iteration."""
    workload = problem.experiment.workload
    return workload.sequences * (workload.prompt.mean + workload.response.mean)
