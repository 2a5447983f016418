"""Exact search where an iteration is a sequence of phases with a barrier between them.

The objective of published candidate tables for RLHF: the calls of a phase start when all calls of
the phase before have ended; within a phase, calls whose meshes share a GPU run one after the other
in any order, others overlap; nothing is charged between calls. A choice fits when on every GPU the
static bytes of all calls placed there plus the largest active bytes among them are within capacity.
(The planner's own objective, the steady state of the augmented graph, is in `planner.simulator`.)

Branch and bound, phase after phase. The bound is proven: phases share nothing but memory, so the sum
of every phase's optimum without the memory that other phases take is at most any plan's cost, and
stays so when some phases are replaced by what was chosen for them. Of candidates with the same call
and mesh only those that no other beats in time, static and active bytes at once are looked at; a
beaten one can be replaced in any plan without loss.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from realloc.errors import InfeasibleError


@dataclass(frozen=True)
class Candidate:
    """One way to run a call: on `size` GPUs from `first` on. `name` tells candidates apart.

    `cost` in any unit of time; `static_bytes` stay while other calls run, `active_bytes` are on top
    of them while the call runs itself.
    """

    call: str
    name: str
    first: int
    size: int
    cost: float
    static_bytes: int
    active_bytes: int

    def overlaps(self, other: Candidate) -> bool:
        return self.first < other.first + other.size and other.first < self.first + self.size


@dataclass(frozen=True)
class PhasedResult:
    """The optimum: `bound` equals `cost`, since the search ran to its end."""

    cost: float
    bound: float
    chosen: Mapping[str, Candidate]
    visited: int


def makespan(chosen: Sequence[Candidate]) -> float:
    """The earliest end of calls that start together, overlapping meshes one after the other."""
    if len(chosen) <= 1:
        return chosen[0].cost if chosen else 0.0
    if len(chosen) == 2:
        a, b = chosen
        return a.cost + b.cost if a.overlaps(b) else max(a.cost, b.cost)
    if len(chosen) == 3:
        return _makespan_of_three(*chosen)
    return min(_in_order(order) for order in permutations(chosen))


def _makespan_of_three(a: Candidate, b: Candidate, c: Candidate) -> float:
    ab, bc, ac = a.overlaps(b), b.overlaps(c), a.overlaps(c)
    met = ab + bc + ac
    if met == 3:
        return a.cost + b.cost + c.cost
    if met == 2:  # one shares GPUs with both others, which may overlap each other
        middle = b.cost if not ac else a.cost if not bc else c.cost
        return middle + max(x.cost for x, alone in ((a, bc), (b, ac), (c, ab)) if alone)
    if met == 1:
        pair = a.cost + b.cost if ab else b.cost + c.cost if bc else a.cost + c.cost
        return max(pair, c.cost if ab else a.cost if bc else b.cost)
    return max(a.cost, b.cost, c.cost)


def _in_order(order: Sequence[Candidate]) -> float:
    """The end when each call starts as soon as earlier ones of the order leave its GPUs."""
    ends: list[tuple[Candidate, float]] = []
    for candidate in order:
        start = max((end for other, end in ends if other.overlaps(candidate)), default=0.0)
        ends.append((candidate, start + candidate.cost))
    return max(end for _, end in ends)


@dataclass(frozen=True)
class _Memory:
    """Static bytes and largest active bytes on each run of GPUs that every mesh takes whole or not."""

    static: tuple[int, ...]
    active: tuple[int, ...]


class PhasedSearch:
    """The search over one table. `phases`: the calls of each phase."""

    def __init__(
        self,
        phases: Sequence[Sequence[str]],
        candidates: Sequence[Candidate],
        capacity_bytes: int,
    ) -> None:
        self._capacity = capacity_bytes
        by_call: dict[str, list[Candidate]] = {call: [] for phase in phases for call in phase}
        for candidate in candidates:
            if candidate.static_bytes + candidate.active_bytes <= capacity_bytes:
                by_call[candidate.call].append(candidate)
        for call, found in by_call.items():
            if not found:
                raise InfeasibleError(f"{call}: no candidate fits in {capacity_bytes} bytes a GPU.")
        self._tables = [[_undominated(by_call[call]) for call in phase] for phase in phases]
        kept = [c for tables in self._tables for table in tables for c in table]
        self._cuts = sorted({edge for c in kept for edge in (c.first, c.first + c.size)})
        self._visited = 0
        self._best = float("inf")
        self._chosen: tuple[Candidate, ...] = ()

    def solve(self) -> PhasedResult:
        """The proven optimum. Raises InfeasibleError when no choice fits."""
        optima = [self._phase_optimum(tables) for tables in self._tables]
        # phases with the heaviest memory first: what they leave decides what the others can do
        order = sorted(range(len(optima)), key=lambda i: -self._least_static(self._tables[i]))
        runs = len(self._cuts) - 1
        self._descend(order, optima, 0.0, _Memory((0,) * runs, (0,) * runs), ())
        if not self._chosen:
            raise InfeasibleError(f"no choice of candidates fits in {self._capacity} bytes on every GPU.")
        chosen = {c.call: c for c in self._chosen}
        return PhasedResult(self._best, self._best, chosen, self._visited)

    def _descend(
        self,
        order: Sequence[int],
        optima: Sequence[float],
        spent: float,
        memory: _Memory,
        chosen: tuple[Candidate, ...],
    ) -> None:
        """Completes `chosen` by the phases in `order`; keeps what beats the best so far."""
        if not order:
            if spent < self._best:
                self._best, self._chosen = spent, chosen
            return
        rest = sum(optima[i] for i in order[1:])
        tables = [self._fitting(table, memory) for table in self._tables[order[0]]]
        for cost, combination, after in self._ascending(tables, memory, optima[order[0]], spent + rest):
            if spent + cost + rest >= self._best:
                return
            self._descend(order[1:], optima, spent + cost, after, chosen + combination)

    def _ascending(
        self,
        tables: Sequence[Sequence[Candidate]],
        memory: _Memory,
        least: float,
        others: float,
    ) -> Iterator[tuple[float, tuple[Candidate, ...], _Memory]]:
        """Combinations of one phase that fit, by ascending makespan, in slices of makespan.

        `others`: what all other phases take at least, so combinations that cannot beat the best
        plan are never made.
        """
        low, high = -1.0, least * 1.0000001
        while low < self._best - others:
            found = sorted(
                self._combinations(tables, memory, low, high, (), others),
                key=lambda item: item[0],
            )
            yield from found
            low, high = high, high * 1.05 + 1e-9
            if high > 1e18 or not all(tables):
                return
            if self._best == float("inf") and low > sum(table[-1].cost for table in tables):
                return

    def _combinations(
        self,
        tables: Sequence[Sequence[Candidate]],
        memory: _Memory,
        low: float,
        high: float,
        chosen: tuple[Candidate, ...],
        others: float,
    ) -> Iterator[tuple[float, tuple[Candidate, ...], _Memory]]:
        """Combinations that fit and whose makespan is above `low` and at most `high`."""
        if len(chosen) == len(tables):
            cost = makespan(chosen)
            if cost > low:
                yield cost, chosen, memory
            return
        for candidate in tables[len(chosen)]:
            if candidate.cost > high:
                break
            longer = (*chosen, candidate)
            cost = makespan(longer)
            if cost > high or cost + others >= self._best:
                continue
            self._visited += 1
            after = self._place(candidate, memory)
            if after is not None:
                yield from self._combinations(tables, after, low, high, longer, others)

    def _fitting(self, table: Sequence[Candidate], memory: _Memory) -> list[Candidate]:
        return [c for c in table if self._place(c, memory) is not None]

    def _place(self, candidate: Candidate, memory: _Memory) -> _Memory | None:
        """Memory with the candidate on top; None when it does not fit."""
        start = bisect_left(self._cuts, candidate.first)
        stop = bisect_left(self._cuts, candidate.first + candidate.size)
        static, active = candidate.static_bytes, candidate.active_bytes
        limit = self._capacity - static
        for used, peak in zip(memory.static[start:stop], memory.active[start:stop], strict=True):
            if used + (peak if peak > active else active) > limit:
                return None
        if not static and not active:
            return memory
        return _Memory(
            (
                *memory.static[:start],
                *(used + static for used in memory.static[start:stop]),
                *memory.static[stop:],
            ),
            (
                *memory.active[:start],
                *(max(peak, active) for peak in memory.active[start:stop]),
                *memory.active[stop:],
            ),
        )

    def _phase_optimum(self, tables: Sequence[Sequence[Candidate]]) -> float:
        """The least makespan of a phase when no other phase takes memory, nor its own calls together."""
        fastest = []
        for table in tables:
            by_mesh: dict[tuple[int, int], Candidate] = {}
            for candidate in table:  # ascending in cost
                by_mesh.setdefault((candidate.first, candidate.size), candidate)
            fastest.append(list(by_mesh.values()))
        best = float("inf")

        def extend(chosen: tuple[Candidate, ...]) -> None:
            nonlocal best
            if len(chosen) == len(fastest):
                best = min(best, makespan(chosen))
                return
            for candidate in fastest[len(chosen)]:
                if candidate.cost >= best:
                    break
                if makespan((*chosen, candidate)) < best:
                    extend((*chosen, candidate))

        extend(())
        return best

    def _least_static(self, tables: Sequence[Sequence[Candidate]]) -> int:
        return sum(min(c.static_bytes * c.size for c in table) for table in tables)


def _undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """By ascending cost: those that no other on the same mesh beats or equals in everything."""
    kept: dict[tuple[int, int], list[Candidate]] = {}
    ordered = sorted(candidates, key=lambda c: (c.cost, c.static_bytes, c.active_bytes, c.name))
    for candidate in ordered:
        mesh = kept.setdefault((candidate.first, candidate.size), [])
        if not any(
            c.static_bytes <= candidate.static_bytes and c.active_bytes <= candidate.active_bytes
            for c in mesh
        ):
            mesh.append(candidate)
    return sorted((c for mesh in kept.values() for c in mesh), key=lambda c: c.cost)
