"""Predicted against measured: terms of the rank that others wait for, and what is named as the cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from realloc.comparison import (
    Comparison,
    Line,
    check_match,
    compare,
    measured_terms,
    timed_terms,
)
from realloc.comparison_text import comparison_content, comparison_text
from realloc.errors import InputError
from realloc.pace import Pace, iterations_at_pace, pace_of
from realloc.plan import ExecutionPlan, Predictions, read_plan
from realloc.trace import BatchLengths, Machine, Trace, TraceRecord, read_trace, trace_lines
from tests.unit.realloc.make import plan_mapping, write

HOST = Machine("x86_64 host with 4 cores", 16)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ExecutionPlan:
    """PPO on 16 ranks, predicted: a second for every call, a tenth for everything else."""
    made = read_plan(write(tmp_path_factory.mktemp("plan") / "plan.yaml", plan_mapping()))
    calls = set(made.placements)
    node_s = {node.name: 1.0 if node.name in calls else 0.1 for node in made.augmented.nodes}
    terms = {name: {"compute": 0.6, "overhead": 0.1, "tp_communication": 0.3} for name in calls}
    predictions = Predictions(sum(node_s.values()), 1.0, node_s, costs="measured (here)", terms=terms)
    return replace(made, predictions=predictions)


def run_of(
    plan: ExecutionPlan,
    *,
    iterations: int = 4,
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    gap_s: float = 0.0,
) -> Trace:
    """A run that takes exactly what is predicted, one node after the other, but for `changed` nodes.

    `changed`: node -> seconds, terms, cpu_s. `gap_s` lies between iterations.
    """
    assert plan.predictions is not None
    now, records = 0.0, []
    for iteration in range(iterations):
        for name in plan.node_order:
            node, change = plan.augmented.by_name[name], (changed or {}).get(name, {})
            seconds = change.get("seconds", plan.predictions.node_s[name])
            terms = {"tp_communication": 0.3} if node.call else {}
            for rank in node.ranks:
                record = TraceRecord(iteration, rank, name, str(node.kind), now, now + seconds, terms=terms)
                fields = {k: v for k, v in change.items() if k in ("terms", "cpu_s")}
                records.append(replace(record, **fields))
            now += seconds
        now += gap_s
    return Trace(plan.cluster.num_gpus, tuple(records), (), HOST)


def causes(comparison: Comparison, name: str) -> str:
    return "; ".join(next(f.causes for f in comparison.findings if f.line.name == name))


def test_a_run_as_predicted_has_nothing_to_say(plan: ExecutionPlan):
    comparison = compare(plan, run_of(plan))
    assert comparison.findings == ()
    assert comparison.total.ratio == pytest.approx(1.0)
    assert all(line.ratio == pytest.approx(1.0) for line in comparison.lines if line.ratio is not None)
    terms = {line.term: line.measured_s for line in comparison.lines if line.node == "actor_gen"}
    assert terms == pytest.approx({"": 1.0, "compute": 0.7, "tp_communication": 0.3})


def test_a_term_that_is_off_is_named_and_others_are_not(plan: ExecutionPlan):
    slow = {"actor_train": {"seconds": 1.5, "terms": {"tp_communication": 0.8}}}
    comparison = compare(plan, run_of(plan, changed=slow))
    assert [f.line.name for f in comparison.findings] == ["actor_train", "actor_train: tp_communication"]
    assert "no known cause" in comparison_text(comparison)
    content: Any = comparison_content(comparison)
    assert content["findings"][1]["ratio"] == pytest.approx(0.8 / 0.3)


def test_memory_is_compared_where_the_allocators_tell(plan: ExecutionPlan, tmp_path: Path):
    assert plan.predictions is not None
    told = {"parameters": 6 << 30, "activations": 2 << 30}
    plan = replace(plan, predictions=replace(plan.predictions, peak_bytes=told))
    run = run_of(plan)
    assert compare(plan, run).memory is None
    full = next(i for i, r in enumerate(run.records) if r.node == "actor_train" and r.rank == 3)
    peaks = [replace(r, peak_bytes=(9 << 30) if i == full else 1 << 30) for i, r in enumerate(run.records)]
    (tmp_path / "trace.jsonl").write_text("\n".join(trace_lines(run.world_size, peaks, (), HOST)))
    comparison = compare(plan, read_trace(tmp_path / "trace.jsonl"))
    text = comparison_text(comparison)
    assert "8 GiB predicted, 9 GiB measured, on rank 3 at actor_train: x 1.12" in text
    content: Any = comparison_content(comparison)
    assert content["memory"]["measured_bytes"] == 9 << 30


def test_terms_are_those_of_the_rank_that_others_wait_for():
    def record(rank: int, iteration: int, waited_s: float) -> TraceRecord:
        terms = {"dp_communication": 0.1 + waited_s, "optimizer": 0.2}
        return TraceRecord(iteration, rank, "train", "call", 0.0, 1.0, terms=terms)

    # rank 1 has more to do, so rank 0 waits half a second for it in the all-reduce
    records = tuple(record(rank, i, 0.5 if rank == 0 else 0.0) for i in range(3) for rank in range(2))
    terms = measured_terms(Trace(2, records))["train"]
    assert terms["dp_communication"] == pytest.approx(0.1)
    assert terms["optimizer"] == pytest.approx(0.2)
    assert terms["compute"] == pytest.approx(0.7)
    assert terms["waiting"] == pytest.approx(0.0)


def test_predicted_terms_are_summed_as_a_run_can_tell_them_apart():
    predicted = {"compute": 1.0, "overhead": 0.5, "bubble": 2.0, "pp_communication": 0.25, "optimizer": 4.0}
    assert timed_terms(predicted) == {"compute": 1.5, "pipeline": 2.25, "optimizer": 4.0}


def test_shared_cores_are_named_with_their_numbers(plan: ExecutionPlan):
    slow = {name: {"seconds": 2.0} for name in plan.placements}
    trace = replace(run_of(plan, changed=slow), machine=Machine("x86_64 host with 2 cores", 2))
    comparison = compare(plan, trace)
    assert "ranks share cores: 16 ranks on 2 cores" in causes(comparison, "actor_gen: compute")
    trace = replace(trace, machine=Machine("NVIDIA H100", 2))
    assert "cores" not in causes(compare(plan, trace), "actor_gen: compute")


def test_a_busy_machine_is_named_with_its_share(plan: ExecutionPlan):
    slow = {"ref_inf": {"seconds": 2.0, "cpu_s": 0.85}}
    found = causes(compare(plan, run_of(plan, changed=slow)), "ref_inf: compute")
    assert "had a core for 50% of their computing time" in found
    slow["ref_inf"]["cpu_s"] = 1.69
    assert "core" not in causes(compare(plan, run_of(plan, changed=slow)), "ref_inf: compute")


def test_lengths_that_differ_are_named_with_both_means(plan: ExecutionPlan):
    slow = {"actor_gen": {"seconds": 0.5}}
    trace = run_of(plan, changed=slow)
    lengths = tuple(BatchLengths(i, ((100, 64),), ((30, 32), (52, 32))) for i in range(4))
    found = causes(compare(plan, replace(trace, lengths=lengths)), "actor_gen")
    assert "responses of 41 tokens on average against 256 planned" in found
    assert "prompts" not in found


def test_analytic_costs_are_named(plan: ExecutionPlan):
    assert plan.predictions is not None
    guessed = replace(plan, predictions=replace(plan.predictions, costs="analytic (h100-sxm)"))
    slow = {"actor_gen": {"seconds": 2.0}}
    assert "analytic (h100-sxm), not measured" in causes(
        compare(guessed, run_of(plan, changed=slow)), "actor_gen"
    )


def test_waiting_between_nodes_counts(plan: ExecutionPlan):
    trace = run_of(plan)
    span = trace.iteration_seconds()
    late = tuple(
        replace(r, start_s=r.start_s + r.iteration * span, end_s=r.end_s + r.iteration * span)
        for r in trace.records
    )
    comparison = compare(plan, replace(trace, records=late))
    assert comparison.total.measured_s == pytest.approx(2 * span)
    waiting = next(f.line for f in comparison.findings if f.line.term == "waiting" and not f.line.node)
    assert waiting.measured_s is not None
    assert waiting.measured_s >= span


def test_runs_of_other_plans_are_refused(plan: ExecutionPlan):
    trace = run_of(plan)
    with pytest.raises(InputError, match="8 ranks, the plan has 16"):
        compare(plan, replace(trace, world_size=8))
    without = tuple(r for r in trace.records if r.node != "ref_inf")
    with pytest.raises(InputError, match="'ref_inf' is in the plan and not in the run"):
        compare(plan, replace(trace, records=without))
    elsewhere = tuple(r for r in trace.records if (r.node, r.rank) != ("critic_train", 0))
    with pytest.raises(InputError, match="ran on ranks 1-7, the plan has it on 0-7"):
        compare(plan, replace(trace, records=elsewhere))
    with pytest.raises(InputError, match="no records"):
        compare(plan, replace(trace, records=()))


def test_without_predictions_there_is_only_what_was_measured(plan: ExecutionPlan, tmp_path: Path):
    text = comparison_text(compare(replace(plan, predictions=None), run_of(plan)))
    assert "has no predictions" in text
    assert "1.0000" in text


PACE = Pace(alone_s=1e-3, together_s=1.5e-3, ranks=2)


def with_pace(trace: Trace, per_rank: Mapping[int, tuple[float, float]]) -> Trace:
    """The trace with a probe of each rank: so many seconds after an iteration's end, for so many."""
    ends: dict[int, float] = {}
    for record in trace.records:
        ends[record.iteration] = max(ends.get(record.iteration, 0.0), record.end_s)
    probes = [
        TraceRecord(iteration, rank, "pace", "pace", end + after, end + after + 2e-3, cpu_s=seconds)
        for iteration, end in ends.items()
        for rank, (after, seconds) in per_rank.items()
    ]
    return replace(trace, records=(*trace.records, *probes))


def test_pace_is_compared_with_what_it_was_beside_as_many_ranks(plan: ExecutionPlan):
    trace = run_of(plan, gap_s=0.1)
    # no two at once: against the work alone; the ranks 0 and 1 of a host at once: against both
    found = pace_of(with_pace(trace, {0: (0.0, 1.2e-3), 1: (0.01, 1.2e-3)}), PACE, 2)
    assert found is not None
    assert found.ratio == pytest.approx(1.2)
    found = pace_of(with_pace(trace, {0: (0.0, 1.2e-3), 1: (0.0, 1.2e-3)}), PACE, 2)
    assert found is not None
    assert found.ratio == pytest.approx(0.8)
    # of two hosts, each knows nothing of the other
    found = pace_of(with_pace(trace, {0: (0.0, 1.2e-3), 1: (0.0, 1.2e-3)}), PACE, 1)
    assert found is not None
    assert found.ratio == pytest.approx(1.2)
    assert pace_of(trace, PACE, 2) is None


def test_iterations_count_that_began_and_ended_at_the_profiles_pace():
    paces = {
        0: (1.0, 1.0),
        1: (1.05, 0.95),
        2: (1.0, 1.6),
        3: (1.0, 1.0),
        4: (1.1, 1.0),
        5: (1.0, 0.8),
        6: (1, 1),
    }
    records = [
        record
        for iteration, of_ranks in paces.items()
        for rank, pace in enumerate(of_ranks)
        for record in (
            TraceRecord(iteration, rank, "gen", "call", iteration + 0.1, iteration + 0.5),
            TraceRecord(iteration, rank, "pace", "pace", iteration + 0.6, iteration + 0.7, cpu_s=pace * 1e-3),
        )
    ]
    trace = Trace(world_size=2, records=tuple(records))
    # 2 ended slow, 3 began so; 5 ended too fast; of 0 nothing is known before
    assert iterations_at_pace(trace, Pace(1e-3, 1e-3, 2), 2) == {1, 4}
    assert iterations_at_pace(trace, Pace(2e-3, 2e-3, 2), 2) == set()
    unknown = replace(trace, records=tuple(r for r in records if (r.iteration, r.kind) != (0, "pace")))
    assert iterations_at_pace(unknown, Pace(1e-3, 1e-3, 2), 2) == {4}


def test_ranks_without_work_and_without_a_core(plan: ExecutionPlan):
    # cores for half of the time of every call: twice as long at the same pace of the work
    halved = {name: {"seconds": 1.0, "cpu_s": 0.35} for name in plan.placements}
    trace = run_of(plan, changed=halved, gap_s=0.1)
    found = pace_of(with_pace(trace, {0: (0.0, 1e-3)}), PACE, 2)
    assert found is not None
    assert (found.core_share, found.work, found.ratio) == pytest.approx((0.5, 1.0, 2.0))
    # a rank that has no call says nothing: it is elsewhere in time
    idle = replace(trace, records=tuple(r for r in trace.records if r.rank != 0))
    assert pace_of(with_pace(idle, {0: (0.0, 1e-3)}), PACE, 2) is None


def test_a_slow_machine_is_told_from_a_wrong_model(plan: ExecutionPlan):
    assert plan.predictions is not None
    slow = {
        name: {"seconds": 1.5 * s, "terms": {"tp_communication": 0.45}}
        for name, s in plan.predictions.node_s.items()
        if name in plan.placements
    }
    slow["actor_train"]["seconds"] = 3.0  # twice as long as the machine explains
    trace = with_pace(run_of(plan, changed=slow, gap_s=0.1), {0: (0.0, 1.5e-3)})
    predicted = replace(plan, predictions=replace(plan.predictions, pace=PACE))
    comparison = compare(predicted, trace)
    gen, train = (next(x for x in comparison.lines if x.name == n) for n in ("actor_gen", "actor_train"))
    assert (gen.ratio, comparison.at_pace(gen)) == pytest.approx((1.5, 1.0))
    assert (train.ratio, comparison.at_pace(train)) == pytest.approx((3.0, 2.0))
    assert "1.50 times slower than when it was profiled" in causes(comparison, "actor_gen")
    text = comparison_text(comparison)
    assert "at pace" in text
    assert "Pace: the machine ran 1.50 times slower" in text
    content: Any = comparison_content(comparison)
    assert content["iteration"]["ratio_at_pace"] == pytest.approx(content["iteration"]["ratio"] / 1.5)
    assert content["pace"]["samples"] == 3
    # a plan that was priced without a pace says nothing of it
    assert "at pace" not in comparison_text(compare(plan, trace))


def test_a_resumed_run_may_have_been_at_no_evaluation(tmp_path: Path):
    content = plan_mapping()
    del content["predictions"]
    content["experiment"]["evaluation"] = {"every": 10}
    content["experiment"]["data"]["holdout"] = 0.1
    for name in ("actor_gen", "rew_inf", "ref_inf"):
        content["placements"][f"eval_{name}"] = content["placements"][name]
    content["placements"]["evaluation"] = {"mesh": "node0:gpu[0-0]", "strategy": "d1t1p1"}
    plan = read_plan(write(tmp_path / "plan.yaml", content))

    def run(iterations: range, but: str = "") -> Trace:
        nodes = [node for node in plan.augmented.nodes if node.name != but]
        records = [
            TraceRecord(i, rank, node.name, str(node.kind), i + 0.1, i + 0.2)
            for i in iterations
            for node in nodes
            if node.runs_in(i)
            for rank in node.ranks
        ]
        return Trace(plan.cluster.num_gpus, tuple(records))

    check_match(plan, run(range(5, 10)))
    check_match(plan, run(range(5, 11)))
    with pytest.raises(InputError, match="'eval_rew_inf' is in the plan and not in the run"):
        check_match(plan, run(range(5, 11), but="eval_rew_inf"))


def test_a_ratio_to_next_to_nothing_says_nothing():
    assert Line("", "waiting", "", 3e-5, 15e-3).ratio is None
    assert Line("", "waiting", "", 3e-4, 15e-3).ratio == pytest.approx(50.0)
    assert Line("", "waiting", "", 0.0, 0.0).ratio is None
