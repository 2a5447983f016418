"""Branch and bound alone, after a few starts: `planner.search.prover`."""

from __future__ import annotations

import random
import time

from planner.problem import Choice, Problem
from planner.result import SearchResult
from planner.search.descent import Descent, fit, starts
from planner.search.method import Clock, Record
from planner.search.prover import Prover
from planner.search.space import Spaces

FIRST_STARTS = 4


def branch(
    problem: Problem, time_limit_s: float, seed: int, *, clock: Clock = time.monotonic
) -> SearchResult:
    """The best of all choices; proven unless the time limit cut the search."""
    record, proven = Record(problem, time_limit_s, clock), False
    with record.interruptible():
        spaces = Spaces(problem)
        begin(record, Descent(record, spaces, random.Random(seed)), FIRST_STARTS)
        proven = Prover(record, spaces).run()
    return record.conclude("branch", proven=proven)


def begin(record: Record, descent: Descent, most: int, enough: int | None = None) -> dict[Choice, float]:
    """Local optima from the `most` most promising starting points; `enough`: so many that fit will do."""
    optima: dict[Choice, float] = {}
    for start in starts(record.problem)[:most]:
        if record.expired and record.best is not None:
            break
        choice = fit(record, start)
        if choice is not None:
            choice, seconds = descent.run(choice, record.evaluate(choice))
            optima[choice] = seconds
            if len(optima) == enough:
                break
    return optima
