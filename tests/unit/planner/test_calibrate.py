"""Calibration: a run on a device that differs from its profile, and what a profile learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.calibration import Calibration
from cost_models.model import CostModel
from cost_models.profile import HardwareProfile, load_profile, read_profile, write_profile
from planner.assess import Assessment
from planner.calibrate import calibrate
from planner.predict import predict
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.mesh import parse_mesh
from realloc.pace import PACE, Pace
from realloc.plan import ExecutionPlan
from realloc.strategy import parse_strategy
from realloc.trace import BatchLengths, Machine, Trace, TraceRecord
from tests.unit.cost_models.cases import experiment

CLUSTER = Cluster(1, 8, "h100-sxm")


def plan_of(generate: str, train: str, made: Experiment | None = None) -> ExecutionPlan:
    """PPO on one node of 8: everything as the generation is, but for training."""
    made = made or experiment(sequences=64, prompt=100, response=100, mean_response=60.0)
    chosen = {}
    for call in made.graph().calls:
        strategy = train if call.name.endswith("train") else generate
        chosen[call.name] = Placement(
            parse_mesh("node[0]", CLUSTER, call.name), parse_strategy(strategy, call.name)
        )
    return ExecutionPlan(made, CLUSTER, chosen)


def slower(base: HardwareProfile) -> HardwareProfile:
    """The same device as it really is: half the products' speed in training, slower links."""
    factors = (("train_step.compute", 1.8), ("train_step.dp_communication", 3.0), ("generate.compute", 0.8))
    more = (("inference.tp_communication", 2.0), ("reallocate", 1.5), ("train_step.tp_communication", 2.0))
    return replace(base, calibration=Calibration("truth", "nobody's", "2026-01-01", 1, (*factors, *more)))


def seconds_of(plan: ExecutionPlan, profile: HardwareProfile) -> float:
    costs = CostModel(plan.experiment, plan.graph, plan.cluster, profile)
    return Assessment(replace(plan, order=plan.node_order), costs).iteration_s


def run_of(plan: ExecutionPlan, profile: HardwareProfile, device: str, iterations: int = 5) -> Trace:
    """A run on a device that does exactly what `profile` says, but for one iteration that is disturbed."""
    costs = CostModel(plan.experiment, plan.graph, plan.cluster, profile)
    records, start = [], 0.0
    for iteration in range(iterations):
        for name in plan.node_order:
            node = plan.augmented.by_name[name]
            seconds = costs.node_s(node, plan.placements) * (5.0 if iteration == 2 else 1.0)
            terms = {}
            if node.call is not None:
                found = costs.call_terms(plan.graph.by_name[node.call], plan.placements[node.call])
                terms = {k: v for k, v in found.items() if k not in ("compute", "overhead") and v}
            for rank in node.ranks:
                records.append(
                    TraceRecord(iteration, rank, name, str(node.kind), start, start + seconds, terms=terms)
                )
            start += seconds
    work = plan.experiment.workload
    lengths = tuple(
        BatchLengths(i, ((int(work.prompt.mean), 64),), ((20, 32), (100, 32))) for i in range(iterations)
    )
    return Trace(plan.cluster.num_gpus, tuple(records), lengths, Machine(device, 64))


@pytest.fixture(scope="module")
def base() -> HardwareProfile:
    return load_profile("h100-sxm")


def measured_lengths(made: Experiment) -> Experiment:
    from realloc.lengths import lengths_of

    work = made.workload
    return replace(made, workload=replace(work, response=lengths_of({20: 32, 100: 32})))


def test_a_calibrated_profile_predicts_its_run_and_another_plan(base: HardwareProfile, tmp_path: Path):
    truth = slower(base)
    made = measured_lengths(experiment(sequences=64, prompt=100, response=100))
    ran, other = plan_of("d4t2p1", "d2t4p1m2", made), plan_of("d2t4p1", "d4t2p1m2z1", made)
    trace = run_of(ran, truth, base.provenance.device)
    found = calibrate(ran, trace, base, run="out/run", date="2026-11-22", name="better")
    assert found.measured_s == pytest.approx(seconds_of(ran, truth), rel=0.02)
    assert abs(found.before_s / found.measured_s - 1) > 0.15
    assert found.after_s == pytest.approx(found.measured_s, rel=0.02)
    before, after, real = (seconds_of(other, p) for p in (base, found.profile, truth))
    assert abs(after / real - 1) < 0.03 < abs(before / real - 1)
    # it is kept in a file with where it came from
    write_profile(found.profile, tmp_path / "better.yaml")
    kept = read_profile(tmp_path / "better.yaml")
    assert kept.calibration is not None
    assert (kept.calibration.base, kept.calibration.run, kept.calibration.samples) == (
        base.name,
        "out/run",
        4,
    )
    assert seconds_of(other, kept) == pytest.approx(after, rel=1e-3)
    assert "calibrated" in str(kept)


def test_lengths_of_the_run_are_not_mistaken_for_costs(base: HardwareProfile):
    # planned with responses of 100 tokens; half of the run's ended after 20
    planned = plan_of("d4t2p1", "d2t4p1m2", experiment(sequences=64, prompt=100, response=100))
    ran = replace(planned, experiment=measured_lengths(planned.experiment))
    found = calibrate(
        planned, run_of(ran, base, base.provenance.device), base, run="r", date="2026-11-22", name="b"
    )
    assert all(factor == pytest.approx(1.0, rel=0.02) for factor in found.factors.values())


def test_calibrating_twice_multiplies(base: HardwareProfile):
    truth = slower(base)
    ran = plan_of("d4t2p1", "d2t4p1m2", measured_lengths(experiment(sequences=64, prompt=100, response=100)))
    trace = run_of(ran, truth, base.provenance.device)
    once = calibrate(ran, trace, base, run="a", date="2026-11-22", name="once").profile
    twice = calibrate(ran, trace, once, run="b", date="2026-11-23", name="twice")
    assert all(factor == pytest.approx(1.0, rel=0.02) for factor in twice.factors.values())
    assert twice.profile.calibration is not None
    assert once.calibration is not None
    assert twice.profile.calibration.base == base.name
    assert dict(twice.profile.calibration.factors) == pytest.approx(dict(once.calibration.factors), rel=0.02)


def at_pace(trace: Trace, slower: float, work_s: float) -> Trace:
    """The run on a machine so many times slower, whose ranks do work of `work_s` as iterations end."""
    records: list[TraceRecord] = []
    ends: dict[int, float] = {}
    for record in trace.records:
        start, end = record.start_s * slower, record.end_s * slower
        terms = {name: seconds * slower for name, seconds in record.terms.items()}
        records.append(replace(record, start_s=start, end_s=end, terms=terms))
        ends[record.iteration] = max(ends.get(record.iteration, 0.0), end)
    for iteration, end in ends.items():
        start, took = end - work_s * slower, work_s * slower
        records += [
            TraceRecord(iteration, rank, PACE, PACE, start, end, cpu_s=took)
            for rank in range(trace.world_size)
        ]
    return replace(trace, records=tuple(records))


def test_a_slow_day_is_not_mistaken_for_a_slow_device(base: HardwareProfile, tmp_path: Path):
    profiled = replace(base, pace=Pace(1e-5, 1e-5, 8))
    truth = slower(base)
    ran = plan_of("d4t2p1", "d2t4p1m2", measured_lengths(experiment(sequences=64, prompt=100, response=100)))
    trace = run_of(ran, truth, base.provenance.device)
    quiet = calibrate(ran, trace, base, run="r", date="2026-11-22", name="b")
    slow = calibrate(ran, at_pace(trace, 1.6, 1e-5), profiled, run="r", date="2026-11-22", name="b")
    assert slow.pace is not None
    assert slow.pace.ratio == pytest.approx(1.6, rel=0.01)
    assert slow.measured_s == pytest.approx(1.6 * quiet.measured_s, rel=0.01)
    assert slow.after_s == pytest.approx(quiet.after_s, rel=0.01)
    assert dict(slow.factors) == pytest.approx(dict(quiet.factors), rel=0.02)
    # the profile keeps the pace that its numbers are of, and says what was taken out
    write_profile(slow.profile, tmp_path / "better.yaml")
    kept = read_profile(tmp_path / "better.yaml")
    assert kept.pace == profiled.pace
    assert kept.calibration is not None
    assert kept.calibration.pace == pytest.approx(1.6, rel=0.01)
    # what is not known cannot be taken out
    blind = calibrate(ran, at_pace(trace, 1.6, 1e-5), base, run="r", date="2026-11-22", name="b")
    assert blind.pace is None
    assert blind.after_s == pytest.approx(blind.measured_s, rel=0.02)


def test_what_cannot_be_calibrated_is_refused(base: HardwareProfile):
    plan = predict(plan_of("d4t2p1", "d2t4p1m2"))
    trace = run_of(plan, base, base.provenance.device)

    def refused(trace: Trace, message: str) -> None:
        with pytest.raises(InputError, match=message):
            calibrate(plan, trace, base, run="r", date="2026-11-22", name="b")

    refused(replace(trace, machine=Machine("x86_64 host with 2 cores", 2)), "the run was on 'x86_64 host")
    refused(replace(trace, machine=None), "does not say on which device")
    refused(replace(trace, records=()), "no records")
    refused(replace(trace, records=tuple(r for r in trace.records if r.iteration == 0)), "run at least two")
    refused(replace(trace, world_size=2), "2 ranks, the plan has 8")
    slow = tuple(replace(r, start_s=r.start_s * 1e3, end_s=r.end_s * 1e3) for r in trace.records)
    refused(replace(trace, records=slow), "is no correction")
