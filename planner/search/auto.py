"""The default search: many starts, each improved call by call, then a seeded random walk.

`greedy` is its first part alone: one start and no walk.
"""

from __future__ import annotations

import random

from planner.bounds import lower_bound_s
from planner.problem import Choice, Problem
from planner.result import SearchResult
from planner.search.descent import descend, descend_pairs, fit, starts
from planner.search.exhaustive import exhaustive
from planner.search.mcmc import walk
from planner.search.method import Record

EXHAUSTIVE_UP_TO = 4000
RANDOM_STARTS = 4
MOVES_PER_CALL = 600
BETAS = (20.0, 200.0)
STALE_ROUNDS = 5
SHORTLIST = 24


def greedy(problem: Problem, time_limit_s: float, seed: int) -> SearchResult:
    """The first start that fits, each call in turn at its best."""
    record = Record(problem, time_limit_s)
    generator = random.Random(seed)
    for start in starts(problem, generator, 0):
        choice = fit(record, start)
        if choice is not None:
            descend(record, choice, record.evaluate(choice), generator)
            break
    return record.conclude("greedy")


def auto(problem: Problem, time_limit_s: float, seed: int) -> SearchResult:
    """All starts, then rounds of walk and descent until several find nothing or the time is up.

    Tries every plan where there are few. Ends early when the lower bound is reached.
    """
    if problem.candidate_set.num_plans <= EXHAUSTIVE_UP_TO:
        return exhaustive(problem, time_limit_s, seed)
    record = Record(problem, time_limit_s)
    generator = random.Random(seed)
    bound_s = lower_bound_s(problem) * (1 + 1e-9)
    optima: dict[Choice, float] = {}
    for start in starts(problem, generator, RANDOM_STARTS):
        if record.best_s <= bound_s or (record.expired and record.best is not None):
            break
        choice = fit(record, start)
        if choice is not None:
            choice, seconds = descend(record, choice, record.evaluate(choice), generator)
            optima[choice] = seconds
    stale = 0
    while record.best is not None and stale < STALE_ROUNDS and record.best_s > bound_s:
        if record.expired:
            break
        before = record.best_s
        # the best local optimum that no walk has started from yet; then the best plan again
        start = min(optima, key=lambda c: (optima[c], c), default=record.best)
        seconds = optima.pop(start, record.best_s)
        choice, seconds = walk(record, start, seconds, generator, MOVES_PER_CALL * len(start), BETAS)
        choice, seconds = descend(record, choice, seconds, generator)
        if seconds <= before:
            choice, seconds = descend_pairs(record, choice, seconds, SHORTLIST)
            descend(record, choice, seconds, generator)
        stale = 0 if record.best_s < before * (1 - 1e-9) else stale + 1
    return record.conclude("auto")
