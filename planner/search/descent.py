"""Local search: starting points, making a choice fit, and improving one or two calls at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

from planner.problem import Choice, Problem
from planner.search.method import Record
from planner.search.splits import best_splits, fastest_within

NUM_SPLITS = 10


def starts(problem: Problem, generator: random.Random, num_random: int) -> list[Choice]:
    """Choices to improve: everything everywhere, roles on shares of the cluster, and random ones."""
    whole = problem.cluster.num_gpus
    found = [tuple(0 for _ in problem.rows)]  # candidates are sorted: each call's fastest
    roles = list(dict.fromkeys(call.role or call.name for call in problem.graph.calls))
    for shares in (1, 2, 4):
        size = whole // shares
        for rotate in range(min(shares, 2)):
            where = {role: (i + rotate) % shares for i, role in enumerate(roles)}
            regions = [(where[c.role or c.name] * size, size) for c in problem.graph.calls]
            found.append(fastest_within(problem, regions))
    found += best_splits(problem, NUM_SPLITS)
    found.append(
        tuple(
            min(range(len(c)), key=lambda k, c=c: (c[k].option.total_bytes, k))  # type: ignore[misc]
            for c in problem.candidates
        )
    )
    for _ in range(num_random):
        found.append(tuple(generator.randrange(len(rows)) for rows in problem.rows))
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


def descend(record: Record, choice: Choice, seconds: float, generator: random.Random) -> tuple[Choice, float]:
    """Each call in turn takes its best candidate given the others, until none improves."""
    problem = record.problem
    calls = list(range(len(choice)))
    generator.shuffle(calls)
    waiting = dict.fromkeys(calls)
    while waiting and not record.expired:
        call = next(iter(waiting))
        del waiting[call]
        improved = False
        for index, row in enumerate(problem.rows[call]):
            if row[0] >= seconds or record.expired:
                break  # sorted by seconds: all that follow take longer alone
            if index == choice[call]:
                continue
            for other in _moved(problem, choice, call, index):
                found = record.evaluate(other, seconds, hasty=True)
                if found < seconds:
                    choice, seconds, improved = other, found, True
        if improved:
            waiting.update(dict.fromkeys(c for c in calls if c != call))
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


def descend_pairs(record: Record, choice: Choice, seconds: float, shortlist: int) -> tuple[Choice, float]:
    """One sweep over pairs of calls: both change at once, within each call's shortlist.

    The shortlist of a call is its fastest candidate on each mesh, largest meshes first. Where the
    two calls stand in each other's way on one mesh, no single change helps but a joint one does.
    """
    problem = record.problem
    lists = [_shortlist(problem, call, shortlist) for call in range(len(choice))]
    for a, b in combinations(range(len(choice)), 2):
        for i in lists[a]:
            if problem.rows[a][i][0] >= seconds:
                continue
            if record.expired:
                return choice, seconds
            for j in lists[b]:
                if problem.rows[b][j][0] >= seconds:
                    continue
                changed = list(choice)
                changed[a], changed[b] = i, j
                other = tuple(changed)
                found = record.evaluate(other, seconds, hasty=True)
                if found < seconds:
                    choice, seconds = other, found
    return choice, seconds


def _shortlist(problem: Problem, call: int, most: int) -> list[int]:
    fastest: dict[tuple[int, int], int] = {}
    for index, row in enumerate(problem.rows[call]):
        fastest.setdefault((row[1], row[2]), index)
    return sorted(fastest.values())[:most]
