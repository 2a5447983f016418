"""Improving a hardware profile by a run: the run's plan is predicted with it, at the lengths that the
run really had, and what differs becomes factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cost_models.calibration import Calibration, factors_of
from cost_models.model import CostModel
from cost_models.profile import HardwareProfile
from planner.assess import Assessment
from planner.predict import predictions_of
from realloc.comparison import check_match
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.lengths import run_lengths
from realloc.pace import PaceFound, pace_of
from realloc.plan import ExecutionPlan
from realloc.trace import Trace


@dataclass(frozen=True)
class Calibrated:
    """The improved profile, and seconds per iteration of the run: measured, and predicted with both.

    `pace`: that of the run against the profile's, which the factors are without; None where either does
    not tell it.
    """

    profile: HardwareProfile
    measured_s: float
    before_s: float
    after_s: float
    factors: Mapping[str, float]
    """What this run has changed: the new factors over those of the base."""
    pace: PaceFound | None = None


def calibrate(
    plan: ExecutionPlan, trace: Trace, base: HardwareProfile, *, run: str, date: str, name: str
) -> Calibrated:
    """`run` and `date` become provenance, `name` the new profile's. Raises InputError.

    Refused are a run on another device than the profile's, one of another plan, and one of a single
    iteration, which warms up.
    """
    check_match(plan, trace)
    if trace.machine is None:
        raise InputError(f"calibrate: the trace of {run} does not say on which device it ran.")
    if trace.machine.device != base.provenance.device:
        raise InputError(
            f"calibrate: the run was on '{trace.machine.device}', the profile {base.name} is of "
            f"'{base.provenance.device}'; give a profile of the run's device with --device."
        )
    samples = len({record.iteration for record in trace.records}) - 1
    if samples < 1:
        raise InputError("calibrate: the run has one iteration, which warms up; run at least two.")
    plan = replace(plan, experiment=with_lengths(plan.experiment, trace))
    before = _predicted(plan, base)
    assert before.predictions is not None
    pace = None if base.pace is None else pace_of(trace, base.pace, plan.cluster.gpus_per_node)
    ratio = None if pace is None else pace.ratio
    factors = factors_of(before, trace, base.calibration, ratio or 1.0)
    known = {} if base.calibration is None else dict(base.calibration.factors)
    calibration = Calibration(
        base=base.calibration.base if base.calibration else base.name,
        run=run,
        date=date,
        samples=samples,
        factors=tuple(sorted(factors.items())),
        pace=ratio,
    )
    profile = replace(base, name=name, calibration=calibration)
    after = _predicted(plan, profile)
    assert after.predictions is not None
    return Calibrated(
        profile=profile,
        measured_s=trace.iteration_seconds(),
        before_s=before.predictions.iteration_s,
        after_s=after.predictions.iteration_s,
        factors={quantity: factor / known.get(quantity, 1.0) for quantity, factor in factors.items()},
        pace=pace,
    )


def _predicted(plan: ExecutionPlan, profile: HardwareProfile) -> ExecutionPlan:
    costs = CostModel(plan.experiment, plan.graph, plan.cluster, profile)
    assessment = Assessment(replace(plan, order=plan.node_order), costs)
    return replace(plan, predictions=predictions_of(plan, assessment))


def with_lengths(experiment: Experiment, trace: Trace) -> Experiment:
    """The experiment with the lengths of a run's sequences; as it is where the trace does not tell them."""
    found = run_lengths(trace)
    if found is None:
        return experiment
    prompt, response = found
    work = experiment.workload
    return replace(experiment, workload=replace(work, prompt=prompt, response=response))
