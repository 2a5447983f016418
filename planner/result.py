"""What a search hands back: the plan, what it knows about it, and what lost against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.memory import GpuMemory
from planner.rejections import Rejection
from planner.simulator import Simulation
from realloc.augmented import Placement
from realloc.plan import ExecutionPlan


@dataclass(frozen=True)
class Progress:
    """A better plan was found after so many evaluations and seconds of search."""

    evaluated: int
    elapsed_s: float
    iteration_s: float


@dataclass(frozen=True)
class Alternative:
    """A plan that lost.

    `call` is the call whose placement alone differs from the chosen plan's, None for a plan of its
    own. `iteration_s` is None when it does not fit in memory; `peak_bytes` is of its worst GPU.
    `why` says what it loses by, `order` in which order its nodes start (none where it does not fit).
    """

    name: str
    call: str | None
    placements: Mapping[str, Placement]
    iteration_s: float | None
    peak_bytes: int
    why: str
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """`plan` carries its order and predictions. `proven`: no candidate plan is faster.
    `lower_bound_s` is of plans of candidates, `bound_of_all_s` also of those with what a large cluster
    leaves out of them (0: not looked at). Plans that were looked at count with the best of the orders
    that were tried, all others in any order. `interrupted`: the search was ended by hand.

    `memory` is of the GPU that needs most; `call_bytes` are each call's own bytes by cause.
    """

    method: str
    plan: ExecutionPlan
    simulation: Simulation
    memory: GpuMemory
    call_bytes: Mapping[str, Mapping[str, int]]
    capacity_bytes: int
    lower_bound_s: float
    bound_of_all_s: float
    proven: bool
    evaluated: int
    elapsed_s: float
    num_plans: int
    history: tuple[Progress, ...]
    runners_up: tuple[Alternative, ...]
    rejections: tuple[Rejection, ...]
    interrupted: bool = False

    @property
    def iteration_s(self) -> float:
        return self.simulation.iteration_s

    @property
    def gap(self) -> float:
        """How far the plan may be above the best one, as a share of its seconds."""
        if self.proven or self.iteration_s <= 0:
            return 0.0
        return max(0.0, 1.0 - self.lower_bound_s / self.iteration_s)
