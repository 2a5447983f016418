"""What branch and bound counts of each call: its candidates, and what a large cluster leaves out.

What is left out (`CandidateSet.others`) stands for a strategy on every mesh of a size. Nothing is known
of its position, and it needs no room for parameters that another call of its role may share. It makes
no plans, but what is proven of plans with it makes bounds hold for all of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from planner.candidates import Candidate
from planner.problem import Problem
from planner.rows import Row
from realloc.augmented import Placement


@dataclass(frozen=True)
class Entry:
    """A candidate, or (`is_known` false) something left out, whose row covers what it surely does."""

    row: Row
    placement: Placement
    is_known: bool = True

    @property
    def size(self) -> int:
        return self.placement.mesh.size

    @property
    def without_offload(self) -> Hashable:
        """The same for a candidate and its variant that offloads."""
        strategy = replace(self.placement.strategy, offload=False)
        return (self.is_known, replace(self.placement, strategy=strategy))

    @property
    def layout(self) -> Hashable:
        """Equal for placements that hold parameters alike, or may do so."""
        return self.row[4] if self.is_known else self.form

    @property
    def form(self) -> Hashable:
        """The layout but for its position."""
        return (self.size, *self.placement.layout_key[1:])


def entries_of(problem: Problem, *, others: bool) -> list[list[Entry]]:
    """Of each call: entry i is candidate i; what is left out follows."""
    found = []
    for call, rows in enumerate(problem.rows):
        known = [Entry(row, one.placement) for row, one in zip(rows, problem.candidates[call], strict=True)]
        role = problem.graph.calls[call].role
        is_shared = role is not None and len(problem.graph.calls_of(role)) > 1
        left_out = problem.others[call] if others else ()
        found.append(known + [_unknown(problem, call, one, is_shared) for one in left_out])
    return found


def _unknown(problem: Problem, call: int, candidate: Candidate, is_shared: bool) -> Entry:
    row, size = problem.row(call, candidate), candidate.placement.mesh.size
    first, stop, parameters = problem.cluster.num_gpus - size, size, 0 if is_shared else row[7]
    return Entry((row[0], first, stop, *row[3:7], parameters, *row[8:]), candidate.placement, is_known=False)
