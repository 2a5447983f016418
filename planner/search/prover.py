"""Branch and bound: the optimum with proof, where it is within reach, and a proven bound where it is not.

On small problems, a tree over candidates. On large ones, a tree over kinds of candidates (numbers of
GPUs, layouts), and below each complete choice of kinds that could still be better a tree over the
candidates of those kinds. Both find plans on the way, the most promising first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import inf

import numpy as np

from planner.problem import Choice
from planner.search.method import Record
from planner.search.space import Space, Spaces
from planner.search.tree import Tree
from planner.windows import Ints

MOST_LEAF_ROWS = 20_000_000
FLAT_UP_TO = 5000
"""Candidates of all calls together, up to which they are looked at one by one."""
ROWS = 50_000_000
ALL_ROWS = 400_000
LEAF_ROWS = 400_000
"""Partial choices to look at below one choice of kinds; four times as many whenever it is come back to."""


class Prover:
    """Improves a record by branch and bound, and raises its bound."""

    def __init__(self, record: Record, spaces: Spaces) -> None:
        self._record, self._spaces = record, spaces
        # what is left below choices of kinds: (least seconds, rows to look at the next time, items)
        self._open: list[tuple[float, int, list[Ints]]] = []

    @property
    def _open_s(self) -> float:
        return min((left_s for left_s, *_ in self._open), default=inf)

    def run(self, most_rows: int = ROWS) -> bool:
        """Whether the best plan of the record is now proven to be the best of all.

        `most_rows`: how many partial choices to look at; the record's time limit counts too.
        """
        if sum(map(len, self._record.problem.rows)) <= FLAT_UP_TO:
            space = self._spaces.one_by_one
            left_s = self._tree(space, self._evaluated(space), most_rows, self._record.raise_bound)
        else:
            kinds = self._spaces.many_as_one()
            self._open = []
            visit, decided = self._opened(kinds), self._spaces.num_first
            left_s = self._tree(kinds, visit, most_rows, self._reached, decided)
            self._come_back(left_s)
            left_s = min(left_s, self._open_s)
        self._record.raise_bound(left_s)
        return left_s >= self._record.best_s * (1 - 1e-9)

    def count_all(self, most_rows: int = ALL_ROWS) -> None:
        """Raises the record's bound of all plans: also those with what a large cluster leaves out.

        As far as kinds say, of the calls that are decided by kind: a look, not a search.
        """
        spaces = Spaces(self._record.problem, others=True)
        least = [self._record.best_s]

        def visit(_: Sequence[int], bound_s: float) -> None:
            least[0] = min(least[0], bound_s)

        kinds, rise = spaces.many_as_one(), self._record.raise_bound_of_all
        tree = _tree(spaces, kinds, visit, lambda: least[0], lambda: self._record.expired, spaces.num_first)
        rise(tree.run(most_rows, rise))

    def _tree(
        self,
        space: Space,
        visit: Callable[[Sequence[int], float], None],
        most_rows: int,
        reached: Callable[[float], None],
        complete: int | None = None,
    ) -> float:
        record = self._record
        tree = _tree(self._spaces, space, visit, lambda: record.best_s, lambda: record.expired, complete)
        return tree.run(most_rows, reached)

    def _reached(self, bound_s: float) -> None:
        self._record.raise_bound(min(bound_s, self._open_s))

    def _evaluated(self, space: Space) -> Callable[[Sequence[int], float], None]:
        """What to do with a choice of candidates: offload where memory asks for it, as little as does."""
        record = self._record

        def visit(row: Sequence[int], _: float) -> None:
            members = [space.members[call][item] for call, item in enumerate(row)]
            plain: Choice = tuple(group[0] for group in members)
            record.evaluate(plain, record.best_s)
            problem = record.problem
            if all(len(of) == 1 for of in members) or problem.peak_bytes(plain) <= problem.capacity_bytes:
                return
            for choice in product(*members):
                if choice != plain:
                    record.evaluate(choice, record.best_s)

        return visit

    def _opened(self, kinds: Space) -> Callable[[Sequence[int], float], None]:
        """What to do with kinds of some calls: a tree over their candidates, and all of the other calls."""
        flat, below = self._spaces.one_by_one, self._spaces.below(kinds)
        every = [np.arange(len(items), dtype=np.int32) for items in flat.items]

        def visit(row: Sequence[int], bound_s: float) -> None:
            kept = [below[call][kind] if kind >= 0 else every[call] for call, kind in enumerate(row)]
            self._below(bound_s, LEAF_ROWS, kept)

        return visit

    def _below(self, bound_s: float, rows: int, kept: list[Ints]) -> None:
        """A tree over some candidates of each call, all of whose choices take at least `bound_s`."""
        space = self._spaces.only(self._spaces.one_by_one, kept)
        left_s = self._tree(space, self._evaluated(space), rows, lambda _: None)
        if left_s < self._record.best_s * (1 - 1e-9):
            self._open.append((max(left_s, bound_s), 4 * rows, kept))

    def _come_back(self, others_s: float) -> None:
        """To what is left below choices of kinds, the least first, while that holds the bound back."""
        while self._open and not self._record.expired:
            self._open.sort(key=lambda item: item[0])
            left_s, rows, kept = self._open[0]
            if left_s >= min(others_s, self._record.best_s * (1 - 1e-9)):
                return
            self._record.raise_bound(left_s)
            if rows > MOST_LEAF_ROWS:
                return
            self._below(left_s, rows, kept)
            self._open.pop(0)


def _tree(
    spaces: Spaces,
    space: Space,
    visit: Callable[[Sequence[int], float], None],
    target: Callable[[], float],
    expired: Callable[[], bool],
    complete: int | None = None,
) -> Tree:
    calls, room = spaces.calls, space.room
    allows = None if room.always_fits else lambda rows, depth: room.allows(rows, calls[: depth + 1])
    return Tree(spaces.windows, space.items, space.prices, calls, allows, visit, target, expired, complete)
