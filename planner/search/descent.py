"""Local search: starting points, making a choice fit, and improving one or two calls at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, product

import numpy as np

from planner.problem import Choice, Problem
from planner.search.method import Record
from planner.search.space import Spaces
from planner.search.splits import best_splits, fastest_within
from planner.search.tree import Bounder

NUM_SPLITS = 10
MOST_TRIED = 64


def starts(problem: Problem) -> list[Choice]:
    """Choices to improve: the best splits, everything everywhere, roles on shares of the cluster."""
    whole = problem.cluster.num_gpus
    found = best_splits(problem, NUM_SPLITS)
    everywhere = [tuple(0 for _ in problem.rows)]  # candidates are sorted: each call's fastest
    roles = list(dict.fromkeys(call.role or call.name for call in problem.graph.calls))
    for shares in (1, 2, 4):
        size = whole // shares
        for rotate in range(min(shares, 2)):
            where = {role: (i + rotate) % shares for i, role in enumerate(roles)}
            regions = [(where[c.role or c.name] * size, size) for c in problem.graph.calls]
            everywhere.append(fastest_within(problem, regions))
    found[1:1] = everywhere[:1]
    found += everywhere[1:]
    found.append(
        tuple(
            min(range(len(c)), key=lambda k, c=c: (c[k].option.total_bytes, k))  # type: ignore[misc]
            for c in problem.candidates
        )
    )
    return list(dict.fromkeys(found))


def fit(record: Record, choice: Choice) -> Choice | None:
    """Changes one call at a time until the choice fits in memory; None when it gets stuck.

    Of the candidates that relieve memory most, takes the fastest.
    """
    problem = record.problem
    over = problem.overflow_bytes(choice)
    while over:
        best = (over, 0.0, choice)
        for call, rows in enumerate(problem.rows):
            for index, row in enumerate(rows):
                other = (*choice[:call], index, *choice[call + 1 :])
                found = (problem.overflow_bytes(other), row[0], other)
                if found[0] < over and found < best:
                    best = found
            if best[0] == 0 or record.expired:
                break
        if best[0] >= over:
            record.overflows(choice, over)
            return None
        over, _, choice = best
    return choice


class Descent:
    """Improves choices call by call, looking only at those that `planner.windows` does not rule out."""

    def __init__(self, record: Record, spaces: Spaces, generator: random.Random) -> None:
        self._record, self._problem, self._random = record, record.problem, generator
        space = spaces.every_candidate()
        self._bounder = Bounder(spaces.windows, space.items, space.prices)

    def run(self, choice: Choice, seconds: float) -> tuple[Choice, float]:
        """Each call in turn takes its best candidate given the others, until none improves."""
        record = self._record
        calls = list(range(len(choice)))
        self._random.shuffle(calls)
        waiting = dict.fromkeys(calls)
        while waiting and not record.expired:
            call = next(iter(waiting))
            del waiting[call]
            before = seconds
            others = [
                other
                for index in range(len(self._problem.rows[call]))
                if index != choice[call]
                for other in _moved(self._problem, choice, call, index)
            ]
            choice, seconds = self._best(others, choice, seconds)
            if seconds < before:
                waiting.update(dict.fromkeys(c for c in calls if c != call))
        return choice, seconds

    def pairs(self, choice: Choice, seconds: float, shortlist: int) -> tuple[Choice, float]:
        """One sweep over pairs of calls: both change at once, within each call's shortlist.

        The shortlist of a call is its fastest candidate on each mesh, largest meshes first. Where the
        two calls stand in each other's way on one mesh, no single change helps but a joint one does.
        """
        lists = [_shortlist(self._problem, call, shortlist) for call in range(len(choice))]
        for a, b in combinations(range(len(choice)), 2):
            if self._record.expired:
                break
            others = []
            for i, j in product(lists[a], lists[b]):
                changed = list(choice)
                changed[a], changed[b] = i, j
                others.append(tuple(changed))
            choice, seconds = self._best(others, choice, seconds)
        return choice, seconds

    def _best(self, others: Sequence[Choice], choice: Choice, seconds: float) -> tuple[Choice, float]:
        """The best of a choice and others, the most promising first."""
        if not others:
            return choice, seconds
        bounds = self._bounder.bounds(np.array(others, dtype=np.int32))
        for at in np.argsort(bounds, kind="stable")[:MOST_TRIED].tolist():
            if bounds[at] >= seconds or self._record.expired:
                break
            found = self._record.evaluate(others[at], seconds, hasty=True)
            if found < seconds:
                choice, seconds = others[at], found
        return choice, seconds


def _moved(problem: Problem, choice: Choice, call: int, index: int) -> Iterator[Choice]:
    """The choice with the call at another candidate: alone, and with those that share its layout."""
    yield (*choice[:call], index, *choice[call + 1 :])
    sharing = problem.sharing(choice, call)
    layout = problem.rows[call][index][4]
    if not sharing or layout == problem.rows[call][choice[call]][4]:
        return
    options = [problem.with_layout[other].get(layout, ()) for other in sharing]
    if not all(options):
        return
    for pick in (0, -1):  # the fastest micro-batches, or the smallest
        changed = list(choice)
        changed[call] = index
        for other, found in zip(sharing, options, strict=True):
            changed[other] = found[pick]
        yield tuple(changed)


def _shortlist(problem: Problem, call: int, most: int) -> list[int]:
    fastest: dict[tuple[int, int], int] = {}
    for index, row in enumerate(problem.rows[call]):
        fastest.setdefault((row[1], row[2]), index)
    return sorted(fastest.values())[:most]
