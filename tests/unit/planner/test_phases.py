"""The exact search over phased tables against trying everything."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations, product

import pytest

from planner.phases import Candidate, PhasedSearch, makespan
from realloc.errors import InfeasibleError

PHASES = (("gen",), ("rew", "ref", "inf"), ("train", "critic"))
MESHES = ((0, 2), (2, 2), (0, 4), (4, 4), (0, 8), (1, 1))
CAPACITY = 100


def random_table(rng: random.Random, phases: Sequence[Sequence[str]] = PHASES) -> list[Candidate]:
    return [
        Candidate(
            call, str(i), *mesh, rng.randint(1, 30), rng.choice([0, 5, 20, 40]), rng.choice([0, 10, 45])
        )
        for phase in phases
        for call in phase
        for i, mesh in enumerate([*rng.sample(MESHES, 3), rng.choice(MESHES)])
    ]


def slow_makespan(chosen: Sequence[Candidate]) -> float:
    """Every order; each call starts when all earlier ones that share a GPU have ended."""
    best = float("inf")
    for order in permutations(chosen):
        free = [0.0] * 8
        for c in order:
            end = max(free[c.first : c.first + c.size]) + c.cost
            free[c.first : c.first + c.size] = [end] * c.size
        best = min(best, max(free))
    return best


def slow_optimum(phases: Sequence[Sequence[str]], table: Sequence[Candidate]) -> float:
    calls = [call for phase in phases for call in phase]
    best = float("inf")
    for choice in product(*([c for c in table if c.call == call] for call in calls)):
        fits = True
        for gpu in range(8):
            here = [c for c in choice if c.first <= gpu < c.first + c.size]
            need = sum(c.static_bytes for c in here) + max((c.active_bytes for c in here), default=0)
            fits = fits and need <= CAPACITY
        if fits:
            by_call = {c.call: c for c in choice}
            cost = sum(slow_makespan([by_call[call] for call in phase]) for phase in phases)
            best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(60))
def test_optimum_equals_trying_everything(seed: int) -> None:
    rng = random.Random(seed)
    table = random_table(rng)
    expected = slow_optimum(PHASES, table)
    result = PhasedSearch(PHASES, table, CAPACITY).solve()
    assert result.cost == result.bound == expected
    assert set(result.chosen) == {call for phase in PHASES for call in phase}


def test_no_choice_fits() -> None:
    heavy = [Candidate(call, "", 0, 8, 1, 30, 20) for phase in PHASES for call in phase]
    assert slow_optimum(PHASES, heavy) == float("inf")
    with pytest.raises(InfeasibleError, match="no choice of candidates fits"):
        PhasedSearch(PHASES, heavy, CAPACITY).solve()
    with pytest.raises(InfeasibleError, match="gen: no candidate fits"):
        PhasedSearch((("gen",),), [Candidate("gen", "", 0, 8, 1, 90, 20)], CAPACITY).solve()


def test_many_tables_are_short_of_memory() -> None:
    """Or else the comparison above would not show that memory is respected."""
    outcomes = []
    for seed in range(60):
        table = random_table(random.Random(seed))
        roomy = [Candidate(c.call, c.name, c.first, c.size, c.cost, 0, 0) for c in table]
        outcomes.append((slow_optimum(PHASES, table), PhasedSearch(PHASES, roomy, CAPACITY).solve().cost))
    assert sum(tight > roomy for tight, roomy in outcomes) > 20


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_makespan_of_any_conflicts(count: int) -> None:
    rng = random.Random(count)
    for _ in range(200):
        chosen = [Candidate(str(i), "", *rng.choice(MESHES), rng.randint(1, 30), 0, 0) for i in range(count)]
        assert makespan(chosen) == slow_makespan(chosen)
