"""Metropolis sampling over choices.

A move to a choice that takes longer is accepted with probability exp(-beta * (new - old) / best):
relative to the best time so far, so that one `beta` suits experiments of milliseconds and of hours.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from math import log

from planner.problem import Choice, Problem
from planner.result import SearchResult
from planner.search.descent import fit, starts
from planner.search.method import Clock, Record

BETA = 60.0


class Moves:
    """Random neighbours of a choice: move one call or a role, swap meshes, copy a placement."""

    def __init__(self, problem: Problem, generator: random.Random) -> None:
        self._problem, self._random = problem, generator
        self._by_mesh, self._by_layout = problem.on_mesh, problem.with_layout

    def neighbour(self, choice: Choice) -> Choice:
        kind = self._random.random()
        changed = list(choice)
        if kind < 0.15:
            self._swap(changed)
        elif kind < 0.3:
            self._copy(changed)
        elif kind < 0.5:
            self._restrategise(changed)
        elif kind < 0.7:
            self._together(choice, changed)
        else:
            call = self._random.randrange(len(changed))
            changed[call] = self._random.randrange(len(self._problem.rows[call]))
        return tuple(changed)

    def _mesh(self, choice: list[int], call: int) -> tuple[int, int]:
        row = self._problem.rows[call][choice[call]]
        return row[1], row[2]

    def _pick(self, choice: list[int], call: int, found: Sequence[int] | None) -> None:
        if found:
            choice[call] = self._random.choice(found)

    def _swap(self, choice: list[int]) -> None:
        """Two calls exchange their meshes, each with some strategy it has there."""
        if len(choice) < 2:
            return
        a, b = self._random.sample(range(len(choice)), 2)
        mesh_a, mesh_b = self._mesh(choice, a), self._mesh(choice, b)
        self._pick(choice, a, self._by_mesh[a].get(mesh_b))
        self._pick(choice, b, self._by_mesh[b].get(mesh_a))

    def _copy(self, choice: list[int]) -> None:
        """One call takes the layout of another, or else its mesh."""
        if len(choice) < 2:
            return
        a, b = self._random.sample(range(len(choice)), 2)
        layout = self._problem.rows[b][choice[b]][4]
        same = self._by_layout[a].get(layout) or self._by_mesh[a].get(self._mesh(choice, b))
        self._pick(choice, a, same)

    def _together(self, choice: Choice, changed: list[int]) -> None:
        """Calls of one role that share a layout go to another one together.

        One at a time, the role's parameters would lie there twice on the way, which may not fit.
        """
        call = self._random.randrange(len(changed))
        if self._random.random() < 0.5:
            self._pick(changed, call, self._by_mesh[call].get(self._mesh(changed, call)))
        else:
            changed[call] = self._random.randrange(len(self._problem.rows[call]))
        layout = self._problem.rows[call][changed[call]][4]
        for other in self._problem.sharing(choice, call):
            self._pick(changed, other, self._by_layout[other].get(layout))

    def _restrategise(self, choice: list[int]) -> None:
        """One call changes its strategy and keeps its mesh."""
        call = self._random.randrange(len(choice))
        self._pick(choice, call, self._by_mesh[call].get(self._mesh(choice, call)))


def walk(
    record: Record,
    choice: Choice,
    seconds: float,
    generator: random.Random,
    num_moves: int,
    betas: tuple[float, float] = (BETA, BETA),
) -> tuple[Choice, float]:
    """`num_moves` Metropolis steps from a choice; returns the best choice of this walk.

    `beta` goes from the first of `betas` to the second, by an equal factor each move.
    """
    moves = Moves(record.problem, generator)
    best, best_s = choice, seconds
    beta = betas[0]
    factor = (betas[1] / betas[0]) ** (1 / max(1, num_moves))
    for step in range(num_moves):
        if step % 64 == 0 and record.expired:
            break
        beta *= factor
        other = moves.neighbour(choice)
        # u < exp(-beta * (new - old) / best)  is the same as  new < old - best * log(u) / beta
        limit = seconds - best_s * log(1.0 - generator.random()) / beta
        if other == choice:
            continue
        found = record.evaluate(other, limit, hasty=True)
        if found < limit:
            choice, seconds = other, found
            if found < best_s:
                best, best_s = other, found
    return best, best_s


def mcmc(
    problem: Problem,
    time_limit_s: float,
    seed: int,
    *,
    num_moves: int = 100_000,
    beta: float = BETA,
    clock: Clock = time.monotonic,
) -> SearchResult:
    """One long walk from the fastest candidates, or the first other starting point that fits."""
    record = Record(problem, time_limit_s, clock)
    with record.interruptible():
        fastest = tuple(0 for _ in problem.rows)
        for start in (fastest, *starts(problem)):
            choice = fit(record, start)
            if choice is not None:
                seconds = record.evaluate(choice)
                walk(record, choice, seconds, random.Random(seed), num_moves, (beta, beta))
                break
    return record.conclude("mcmc")
