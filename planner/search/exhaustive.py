"""Every choice of candidates: the oracle for all other methods, on small problems."""

from __future__ import annotations

import time
from itertools import product

from planner.problem import Problem
from planner.result import SearchResult
from planner.search.method import Clock, Record
from realloc.errors import InputError

MOST_PLANS = 2_000_000


def exhaustive(
    problem: Problem, time_limit_s: float, seed: int, *, clock: Clock = time.monotonic
) -> SearchResult:
    """The best of all choices. The result is proven unless the time limit cut the search.

    Raises InputError above MOST_PLANS choices.
    """
    number = problem.candidate_set.num_plans
    if number > MOST_PLANS:
        raise InputError(
            f"method exhaustive: {number:.3g} plans are too many (at most {MOST_PLANS:,}); "
            f"use the method auto, or a smaller cluster."
        )
    record = Record(problem, time_limit_s, clock)
    complete = True
    for count, choice in enumerate(product(*(range(len(rows)) for rows in problem.rows))):
        record.evaluate(choice, record.best_s)
        if count % 256 == 0 and record.expired:
            complete = False
            break
    if record.best is None:
        choice = tuple(
            min(range(len(c)), key=lambda k, c=c: c[k].option.total_bytes)  # type: ignore[misc]
            for c in problem.candidates
        )
        record.overflows(choice, problem.overflow_bytes(choice))
    return record.conclude("exhaustive", proven=complete)
