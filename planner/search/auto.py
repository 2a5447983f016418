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
RANDOM_STARTS = 6
MOVES_PER_CALL = 400
ROUNDS = 4
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
    """All starts, then rounds of walk and descent until a round finds nothing or the time is up.

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
    for number in range(ROUNDS * 4):
        if record.best is None or record.best_s <= bound_s or record.expired or stale >= ROUNDS:
            break
        before = record.best_s
        # every other round starts from another local optimum
        ranked = sorted(optima, key=lambda c: (optima[c], c))
        start = record.best if number % 2 == 0 else ranked[(number // 2) % len(ranked)]
        seconds = optima.get(start, record.best_s)
        walk(record, start, seconds, generator, MOVES_PER_CALL * len(start))
        choice, seconds = descend(record, record.best, record.best_s, generator)
        choice, seconds = descend_pairs(record, choice, seconds, SHORTLIST)
        choice, seconds = descend(record, choice, seconds, generator)
        optima[choice] = seconds
        stale = 0 if record.best_s < before * (1 - 1e-9) else stale + 1
    return record.conclude("auto")
