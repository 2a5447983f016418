"""Branch and bound: the optimum with proof, where it is within reach.

Calls are placed one after the other. A partial plan is given up when it does not fit in memory, or
when the calls placed so far, with the least that the others can add, prove that no completion beats
the best plan known. All bounds leave out transfers, reallocations and the order of calls, so they
hold for every completion.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from planner.problem import Problem
from planner.result import SearchResult
from planner.rows import Row, load
from planner.search.descent import descend, fit, starts
from planner.search.method import Record


class _Tree:
    """Depth-first over calls in a fixed order."""

    def __init__(self, record: Record) -> None:
        self.record, self.problem = record, record.problem
        rows = self.problem.rows
        count = len(rows)
        self.calls = sorted(range(count), key=lambda i: -min(row[0] for row in rows[i]))
        position = {call: at for at, call in enumerate(self.calls)}
        fastest = [min(row[0] for row in table) for table in rows]
        smallest = [min(row[0] * (row[2] - row[1]) for row in table) for table in rows]
        # at each depth: the least GPU-seconds of the calls not placed yet
        self.area_left = [sum(smallest[c] for c in self.calls[depth + 1 :]) for depth in range(count)]
        # at each depth: cycles through that call as (calls placed before it, seconds of the others)
        self.cycles: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in range(count)]
        for cycle in self.problem.cycles:
            for call in cycle:
                depth = position[call]
                placed = tuple(c for c in cycle if position[c] < depth)
                rest = sum(fastest[c] for c in cycle if position[c] > depth)
                self.cycles[depth].append((placed, rest))
        self.placed: list[Row | None] = [None] * count
        self.choice = [0] * count
        self.complete = True

    def search(self, depth: int, area: float) -> None:
        """Tries all candidates of the call at this depth; `area` are GPU-seconds placed so far."""
        record, problem = self.record, self.problem
        if record.expired:
            self.complete = False
            return
        call = self.calls[depth]
        last = depth + 1 == len(self.calls)
        for index, row in enumerate(problem.rows[call]):
            best_s = record.best_s
            seconds = row[0]
            if any(self._busy(placed) + seconds + rest >= best_s for placed, rest in self.cycles[depth]):
                break  # sorted by seconds: the same holds for all that follow
            spent = area + seconds * (row[2] - row[1])
            if (spent + self.area_left[depth]) / problem.cluster.num_gpus >= best_s:
                continue
            self.placed[call], self.choice[call] = row, index
            if self._fits(row, best_s):
                if last:
                    record.evaluate(tuple(self.choice), best_s)
                else:
                    self.search(depth + 1, spent)
            self.placed[call] = None
            if not self.complete:
                return

    def _busy(self, calls: Sequence[int]) -> float:
        total = 0.0
        for call in calls:
            row = self.placed[call]
            if row is not None:
                total += row[0]
        return total

    def _fits(self, new: Row, best_s: float) -> bool:
        """Whether the calls placed so far fit in memory and leave every GPU time to spare.

        Only GPUs of the new call can have become worse.
        """
        rows = [row for row in self.placed if row is not None]
        for gpu in {max(row[1], new[1]) for row in rows}:
            if new[1] <= gpu < new[2]:
                size, busy = load(rows, gpu)
                if size > self.problem.capacity_bytes or busy >= best_s:
                    return False
        return True


def branch(problem: Problem, time_limit_s: float, seed: int) -> SearchResult:
    """The best of all choices; proven unless the time limit cut the search."""
    record = Record(problem, time_limit_s)
    generator = random.Random(seed)
    for start in starts(problem, generator, 2):
        choice = fit(record, start)
        if choice is not None:
            descend(record, choice, record.evaluate(choice), generator)
    tree = _Tree(record)
    tree.search(0, 0.0)
    return record.conclude("branch", proven=tree.complete)
