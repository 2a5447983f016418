"""The default search: a few starts improved call by call, then branch and bound, then a seeded walk.

Small problems end with the proof. On large ones branch and bound finds most of the plan and a bound,
and the rest of the time goes to walks and descents. `greedy` is one start alone.
"""

from __future__ import annotations

import random
import time

from planner.problem import Problem
from planner.result import SearchResult
from planner.search.branch import FIRST_STARTS, begin
from planner.search.descent import Descent
from planner.search.exhaustive import exhaustive
from planner.search.mcmc import walk
from planner.search.method import Clock, Record
from planner.search.prover import Prover
from planner.search.space import Spaces

EXHAUSTIVE_UP_TO = 4000
PROOF_ROWS = 6_000_000
"""Partial choices that branch and bound looks at before walks begin."""
STARTS = 24
MOVES_PER_CALL = 600
BETAS = (20.0, 200.0)
STALE_ROUNDS = 5
SHORTLIST = 24


def greedy(
    problem: Problem, time_limit_s: float, seed: int, *, clock: Clock = time.monotonic
) -> SearchResult:
    """The first start that fits, each call in turn at its best."""
    record = Record(problem, time_limit_s, clock)
    with record.interruptible():
        begin(record, Descent(record, Spaces(problem), random.Random(seed)), STARTS, enough=1)
    return record.conclude("greedy")


def auto(problem: Problem, time_limit_s: float, seed: int, *, clock: Clock = time.monotonic) -> SearchResult:
    """Starts, branch and bound, walks: until the proof, until several rounds find nothing, or the time is up.

    Deterministic for a seed when it ends by itself; a time limit cuts it where the machine got to.
    Tries every plan where there are few.
    """
    if problem.candidate_set.num_plans <= EXHAUSTIVE_UP_TO:
        return exhaustive(problem, time_limit_s, seed, clock=clock)
    record, proven = Record(problem, time_limit_s, clock), False
    with record.interruptible():
        proven = _auto(record, random.Random(seed))
    return record.conclude("auto", proven=proven)


def _auto(record: Record, generator: random.Random) -> bool:
    """Whether the best plan of the record is proven to be the best of all."""
    spaces = Spaces(record.problem)
    descent = Descent(record, spaces, generator)
    optima = begin(record, descent, FIRST_STARTS)
    if record.best is None:  # nothing fits so easily
        optima = begin(record, descent, STARTS)
    prover = Prover(record, spaces)
    if any(record.problem.others):
        prover.count_all()
    if prover.run(PROOF_ROWS):
        return True
    stale = 0
    while record.best is not None and stale < STALE_ROUNDS and not record.expired:
        before = record.best_s
        # the best plan first; then the local optima that no walk has started from yet
        start = min(optima, key=lambda c: (optima[c], c), default=record.best) if stale else record.best
        seconds = optima.pop(start, record.best_s)
        choice, seconds = walk(record, start, seconds, generator, MOVES_PER_CALL * len(start), BETAS)
        choice, seconds = descent.run(choice, seconds)
        if seconds >= before:
            choice, seconds = descent.pairs(choice, seconds, SHORTLIST)
            descent.run(choice, seconds)
        stale = 0 if record.best_s < before * (1 - 1e-9) else stale + 1
    return False
