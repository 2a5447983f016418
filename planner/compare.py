"""The searched plan beside the plans that rules of thumb make: who loses how much, and by what.

Compares plans that it is given or that baselines make; searches nothing and words nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.assess import Assessment, ordered
from planner.baselines import BASELINES, Baseline
from planner.budget import reasons
from planner.infeasible import describe_bytes, remedy
from planner.options import gib
from realloc.errors import ReallocError
from realloc.plan import ExecutionPlan

SEARCHED = "searched"


@dataclass(frozen=True)
class Contender:
    """One plan of a comparison. `assessment` is None when the rule made no plan, which `why` tells.

    `fits`: it fits in memory and the experiment's constraints allow it; `why` says what is wrong
    otherwise, and what it loses by if it is slower than the searched plan.
    """

    name: str
    description: str
    assessment: Assessment | None
    fits: bool
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The searched plan and the others, fastest first; those that do not fit come last."""

    searched: Contender
    others: tuple[Contender, ...]

    def slower(self, other: Contender) -> float | None:
        """How many times the searched plan's seconds another takes; None where it does not fit."""
        if other.assessment is None or not other.fits or self.searched.assessment is None:
            return None
        return other.assessment.iteration_s / self.searched.assessment.iteration_s


def compare(searched: ExecutionPlan, baselines: Mapping[str, Baseline] = BASELINES) -> Comparison:
    """Makes every baseline's plan for the searched plan's experiment and cluster, and compares.

    Raises InputError for an unknown device.
    """
    plan = searched
    costs = CostModel(plan.experiment, plan.graph, plan.cluster, load_profile(plan.cluster.device))
    best = Assessment(plan, costs)
    others = [_contender(baseline, plan, costs, best) for baseline in baselines.values()]
    others.sort(key=lambda c: (not c.fits, c.assessment.iteration_s if c.assessment else 0.0))
    return Comparison(Contender(SEARCHED, "what search found", best, best.fits), tuple(others))


def _contender(baseline: Baseline, plan: ExecutionPlan, costs: CostModel, best: Assessment) -> Contender:
    name, description = baseline.name, baseline.description
    try:
        placements = baseline.place(plan.experiment, plan.cluster, costs)
        made = ExecutionPlan(plan.experiment, plan.cluster, placements)
        made.check(name)
    except ReallocError as error:
        return Contender(name, description, None, False, (str(error),))
    found = Assessment(ordered(made, costs), costs)
    if not found.fits:
        memory = found.memory
        why = (
            f"needs {gib(memory.total_bytes)} on GPU {memory.gpu} while {memory.call} runs "
            f"({describe_bytes(memory.by_cause)}), but only {gib(found.capacity_bytes)} may be used; "
            f"{remedy(memory.by_cause)}"
        )
        return Contender(name, description, found, False, (why,))
    return Contender(name, description, found, True, reasons(best, found))
