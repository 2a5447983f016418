"""Best-first branch and bound over one item for each call, many partial choices at a time.

An item stands for candidates of a call: for one of them, or for all with the same number of GPUs and
the same layout. Decides what is looked at next and what can be left out; `planner.windows` says how
many seconds a partial choice takes at least, its user what to do with complete ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from planner.windows import Bools, Floats, Ints, Plans, Windows

AT_ONCE = 1 << 15
CHUNK = 512
PRICED_AT_ONCE = 64
_SLACK = 1e-9

_Slice = tuple[float, int, int, Ints, Floats]
"""The least bound, a number that tells slices apart, how many calls are decided, rows, their bounds."""
Price = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Items:
    """The items of one call, as arrays of equal length.

    `seconds` are the least of what an item stands for, `first` to `stop` the GPUs that all of it
    covers (none when stop <= first), `layouts` what decides the seconds of moves.
    """

    seconds: Floats
    sizes: Ints
    first: Ints
    stop: Ints
    layouts: Ints

    def __len__(self) -> int:
        return len(self.seconds)

    def only(self, kept: Bools | Ints) -> Items:
        return Items(
            *(getattr(self, name)[kept] for name in ("seconds", "sizes", "first", "stop", "layouts"))
        )


class MovePrices:
    """Seconds of moves by layouts at both ends, asked for when needed: first at least, then exactly.

    Both prices are of (user, layout of the user, layout of the trainer); `least` is quick and at most
    `price`. A move within one layout is free.
    """

    def __init__(self, windows: Windows, items: Sequence[Items], least: Price, price: Price) -> None:
        self._users, self._prices = windows.users, (least, price)
        self._ends = [
            (_Numbers(items[user].layouts), _Numbers(items[trainer].layouts)) for user, trainer in self._users
        ]
        self._known = [np.zeros((u.count, t.count)) for u, t in self._ends]
        # how many of the two prices were asked for
        self._asked = [np.zeros((u.count, t.count), dtype=np.int8) for u, t in self._ends]

    def known(self, move: int, user: Ints, trainer: Ints) -> Floats:
        """Seconds as far as they were asked for, else 0."""
        u, t = self._ends[move]
        found: Floats = self._known[move][u.of[user], t.of[trainer]]
        return found

    def ask(self, move: int, user: Ints, trainer: Ints) -> bool:
        """Has them priced, one step further than the least that is known of them; whether there was one."""
        table, asked, (us, ts) = self._known[move], self._asked[move], self._ends[move]
        step = asked[us.of[user], ts.of[trainer]]
        least = int(step.min())
        if least == len(self._prices):
            return False
        wanted = step == least
        for u, t in {*zip(user[wanted].tolist(), trainer[wanted].tolist(), strict=True)}:
            table[us.of[u], ts.of[t]] = 0.0 if u == t else self._prices[least](self._users[move][0], u, t)
            asked[us.of[u], ts.of[t]] = len(self._prices) if u == t else least + 1
        return True


class _Numbers:
    """Consecutive numbers for the layouts that occur: `of[layout]`."""

    def __init__(self, layouts: Ints) -> None:
        found = np.unique(layouts)
        self.count = len(found)
        self.of = np.zeros(int(found[-1]) + 1 if self.count else 1, dtype=np.int32)
        self.of[found] = np.arange(self.count)


class Bounder:
    """Seconds that choices of items take at least: rows of item numbers, -1 where a call is not decided."""

    def __init__(self, windows: Windows, items: Sequence[Items], prices: MovePrices) -> None:
        self.windows, self.items, self.prices = windows, items, prices
        self.looked_at = 0
        self._areas = [[shares[i.sizes] * i.seconds for shares in windows.shares] for i in items]
        every = [np.arange(len(one), dtype=np.int32) for one in items]
        self._least = [self._minima(call, alive) for call, alive in enumerate(every)]

    def narrow(self, alive: Sequence[Ints]) -> None:
        """From here on, calls that are not decided take one of these items."""
        self._least = [self._minima(call, items) for call, items in enumerate(alive)]

    def _minima(self, call: int, alive: Ints) -> tuple[float, int, Sequence[float]]:
        items = self.items[call]
        if not len(alive):
            return inf, self.windows.num_gpus, [inf for _ in self._areas[call]]
        areas = [float(area[alive].min()) for area in self._areas[call]]
        return float(items.seconds[alive].min()), int(items.sizes[alive].min()), areas

    def bounds(self, rows: Ints) -> Floats:
        """Of rows in which the same calls are decided."""
        self.looked_at += len(rows)
        num_gpus, count = self.windows.num_gpus, len(rows)
        seconds: list[Floats] = []
        sizes: list[Ints] = []
        first: list[Ints] = []
        stop: list[Ints] = []
        places = (sizes, first, stop)
        areas: list[list[Floats]] = [[] for _ in self.windows.shares]
        for call, items in enumerate(self.items):
            at = rows[:, call]
            if at[0] >= 0:
                seconds.append(items.seconds[at])
                for row, values in zip(places, (items.sizes, items.first, items.stop), strict=True):
                    row.append(values[at])
                for line, area in zip(areas, self._areas[call], strict=True):
                    line.append(area[at])
                continue
            least_s, size, least_areas = self._least[call]
            seconds.append(np.full(count, least_s))
            for row, value in zip(places, (size, num_gpus - size, size), strict=True):
                row.append(np.full(count, value, dtype=np.int32))
            for line, area_s in zip(areas, least_areas, strict=True):
                line.append(np.full(count, area_s))
        moves = []
        for move, (user, trainer) in enumerate(self.windows.users):
            u, t = rows[:, user], rows[:, trainer]
            if u[0] < 0 or t[0] < 0:
                moves.append(np.zeros(count))
                continue
            ends = self.items[user].layouts[u], self.items[trainer].layouts[t]
            moves.append(self.prices.known(move, *ends))
        return self.windows.bounds(Plans(seconds, sizes, first, stop, areas, moves))


class Tree:
    """`calls`: the order in which they are decided. `rows[:, call]` is an item, or -1.

    `allows(rows, depth)`: which partial choices may fit in memory, the call at `depth` being new.
    `visit(row, bound)`: a choice whose bound is below the target, with the first `complete` calls
    decided (None: all).
    """

    def __init__(
        self,
        windows: Windows,
        items: Sequence[Items],
        prices: MovePrices,
        calls: Sequence[int],
        allows: Callable[[Ints, int], Bools] | None,
        visit: Callable[[Sequence[int], float], None],
        target: Callable[[], float],
        expired: Callable[[], bool],
        complete: int | None = None,
    ) -> None:
        self._complete = len(items) if complete is None else complete
        self._bounder = Bounder(windows, items, prices)
        self._windows, self._items, self._prices, self._calls = windows, items, prices, list(calls)
        self._allows, self._visit, self._target, self._expired = allows, visit, target, expired
        self._alive: list[Ints] = []

    def run(self, most_rows: int, reached: Callable[[float], None]) -> float:
        """Visits all choices whose bound is below the target, unless the time is up.

        Returns what every choice that was not visited takes at least: the target at the end, or the
        least bound of what is still open when `most_rows` partial choices were looked at. `reached` is
        told the same on the way.
        """
        count = len(self._items)
        self._alive = self._worth_a_look()
        root = np.full((1, count), -1, dtype=np.int32)
        heap: list[_Slice] = [(0.0, 0, 0, root, np.zeros(1))]
        made = 0
        while heap:
            bound, _, depth, rows, bounds = heapq.heappop(heap)
            target = self._target()
            if bound >= target * (1 - _SLACK):
                break
            reached(bound)
            if self._bounder.looked_at >= most_rows or self._expired():
                return bound
            keep = bounds < target * (1 - _SLACK)
            rows, bounds = rows[keep], bounds[keep]
            if not len(rows):
                continue
            if self._ask_moves(rows):
                values = np.maximum(bounds, self._bounder.bounds(rows))
                made = self._push(heap, depth, rows, values, made)
                continue
            if depth == self._complete:
                made = self._visited(heap, rows, bounds, made)
                continue
            for after, values in self._grown(depth, rows, bounds, target):
                made = self._push(heap, depth + 1, after, values, made)
                if self._expired():
                    return bound
        return self._target()

    def _visited(self, heap: list[_Slice], rows: Ints, bounds: Floats, made: int) -> int:
        """Visits rows, the most promising first, until others are more so; those go back."""
        for at, (row, least) in enumerate(zip(rows.tolist(), bounds.tolist(), strict=True)):
            if heap and heap[0][0] < least:
                return self._push(heap, self._complete, rows[at:], bounds[at:], made)
            if least < self._target() * (1 - _SLACK):
                self._visit(row, least)
        return made

    def _push(
        self,
        heap: list[_Slice],
        depth: int,
        rows: Ints,
        bounds: Floats,
        made: int,
    ) -> int:
        """Adds rows in slices, the most promising together. Returns how many slices were made so far."""
        order = np.argsort(bounds, kind="stable")
        size = PRICED_AT_ONCE if self._completes_move(depth) else CHUNK
        for start in range(0, len(order), size):
            part = order[start : start + size]
            made += 1
            heapq.heappush(heap, (float(bounds[part[0]]), -made, depth, rows[part], bounds[part]))
        return made

    def _completes_move(self, depth: int) -> bool:
        """Whether the last call decided is an end of a move whose other end was decided before."""
        last, decided = self._calls[depth - 1], {*self._calls[:depth]}
        return any(last in ends and set(ends) <= decided for ends in self._windows.users)

    def _ask_moves(self, rows: Ints) -> bool:
        """Has all moves priced that the decided calls imply; whether some were not asked for before."""
        asked = False
        for move, (user, trainer) in enumerate(self._windows.users):
            u, t = rows[:, user], rows[:, trainer]
            if u[0] >= 0 and t[0] >= 0:
                ends = self._items[user].layouts[u], self._items[trainer].layouts[t]
                asked |= self._prices.ask(move, *ends)
        return asked

    def _worth_a_look(self) -> list[Ints]:
        """Of each call, the items that are below the target with the others at their least."""
        count = len(self._items)
        alive = [np.arange(len(items), dtype=np.int32) for items in self._items]
        for _ in range(2):
            for call in range(count):
                rows = np.full((len(alive[call]), count), -1, dtype=np.int32)
                rows[:, call] = alive[call]
                alive[call] = alive[call][self._bounder.bounds(rows) < self._target() * (1 - _SLACK)]
                if not len(alive[call]):
                    return alive
                self._bounder.narrow(alive)
        return alive

    def _grown(self, depth: int, rows: Ints, bounds: Floats, target: float) -> Iterator[tuple[Ints, Floats]]:
        """The rows with one more call decided."""
        call = self._calls[depth]
        alive = self._alive[call]
        step = max(1, AT_ONCE // max(1, len(alive)))
        for start in range(0, len(rows), step):
            part = np.repeat(rows[start : start + step], len(alive), axis=0)
            part[:, call] = np.tile(alive, len(part) // max(1, len(alive)))
            floor = np.repeat(bounds[start : start + step], len(alive))
            if self._allows is not None:
                fits = self._allows(part, depth)
                part, floor = part[fits], floor[fits]
            yield from self._below(part, floor, target)

    def _below(self, rows: Ints, floor: Floats, target: float) -> Iterator[tuple[Ints, Floats]]:
        if len(rows):
            values = np.maximum(self._bounder.bounds(rows), floor)
            keep = values < target * (1 - _SLACK)
            if keep.any():
                yield rows[keep], values[keep]
