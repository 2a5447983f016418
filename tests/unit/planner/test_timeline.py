"""Timelines: the chart, the tables and the spans of a plan by hand; a slow link changes the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.link import Link
from cost_models.profile import load_profile, write_profile
from planner.api import search_plan
from planner.predict import assess, predict
from planner.timeline import predicted_spans, timeline_content, timeline_text
from realloc.augmented import Placement
from realloc.chrome_trace import chrome_trace, measured_spans
from realloc.cluster import Cluster
from realloc.mesh import parse_mesh
from realloc.plan import ExecutionPlan, read_plan, write_plan
from realloc.strategy import parse_strategy
from realloc.trace import Trace, TraceRecord
from tests.unit.cost_models.cases import experiment

CLUSTER = Cluster(1, 8, "h100-sxm")
SPLIT = {"actor_train": "node0:gpu[0-3]", "critic_train": "node0:gpu[4-7]"}


@pytest.fixture(scope="module")
def plan() -> ExecutionPlan:
    """Actor and critic train side by side, everything else takes the whole node."""
    made = experiment(sequences=64)
    made = replace(made, models={r: replace(spec, model="llama-7b") for r, spec in made.models.items()})
    chosen = {
        call.name: Placement(
            parse_mesh(SPLIT.get(call.name, "node[0]"), CLUSTER, call.name),
            parse_strategy("d1t4p1" if call.name in SPLIT else "d2t4p1", call.name),
        )
        for call in made.graph().calls
    }
    return ExecutionPlan(made, CLUSTER, chosen)


def test_the_chart_has_a_row_for_gpus_that_do_the_same(plan: ExecutionPlan):
    text = timeline_text(assess(plan))
    rows = [line for line in text.splitlines() if line.startswith("GPU ") and line.endswith("|")]
    assert [row.split("|")[0].strip() for row in rows] == ["GPU 0-3", "GPU 4-7"]
    first, last = (row.split("|")[1] for row in rows)
    marks = {line.split()[1]: line.split()[0] for line in text.splitlines() if line[1:3] == "  "}
    actor, critic = marks["actor_train"], marks["critic_train"]
    assert actor in first
    assert actor not in last
    assert critic in last
    # the longer of the two trainings is on the critical path, the other one is not
    path = text.split("Critical path")[1].split("Peak memory")[0]
    assert ("actor_train" in path) != ("critic_train" in path)


def test_json_has_what_the_text_shows(plan: ExecutionPlan):
    assessment = assess(plan)
    content: Any = json.loads(json.dumps(timeline_content(assessment)))
    nodes = {node["name"]: node for node in content["nodes"]}
    assert set(nodes) == set(plan.augmented.by_name)
    for call in plan.placements:  # terms below a thousandth are left out
        assert sum(nodes[call]["terms"].values()) == pytest.approx(nodes[call]["seconds"], rel=0.01)
    assert content["iteration_s"] == assessment.iteration_s
    assert set(content["memory"]) == {"0-3", "4-7"}


def test_memory_that_tensors_cannot_have_is_told_and_a_plan_that_needs_it_does_not_fit(plan: ExecutionPlan):
    text = timeline_text(assess(plan))
    assert "Peak memory of 75.8 GiB a GPU, beside 3.9 GiB for the driver" in text
    assert "does not fit" not in text
    # what the user says may be used is all for tensors
    peak = assess(plan).memory.total_bytes
    small = replace(plan, cluster=replace(plan.cluster, memory_bytes=peak - 1))
    text = timeline_text(assess(small))
    assert "beside" not in text
    assert text.count("this does not fit") >= 1


def test_predictions_go_through_a_plans_file(plan: ExecutionPlan, tmp_path: Path):
    predicted = predict(plan)
    write_plan(predicted, tmp_path / "plan.yaml")
    kept = read_plan(tmp_path / "plan.yaml").predictions
    assert kept is not None
    assert predicted.predictions is not None
    assert kept.iteration_s == pytest.approx(assess(plan).iteration_s, rel=1e-5)
    for name, terms in predicted.predictions.terms.items():
        assert kept.terms[name] == pytest.approx(dict(terms), rel=1e-5)
        assert sum(terms.values()) == pytest.approx(predicted.predictions.node_s[name])


def test_a_trace_viewers_file_has_every_rank_of_every_node(plan: ExecutionPlan):
    document: Any = json.loads(chrome_trace({"predicted": tuple(predicted_spans(assess(plan)))}))
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert {(e["name"], e["tid"]) for e in events} == {
        (node.name, rank) for node in plan.augmented.nodes for rank in node.ranks
    }
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)


def test_waiting_is_a_span_of_its_own_in_measured_timelines():
    record = TraceRecord(0, 1, "gen", "call", 1.0, 3.0, wait_s=0.5, tokens=7, terms={"optimizer": 0.25})
    wait, work = measured_spans(Trace(2, (record,)))
    assert (wait.name, wait.start_s, wait.seconds) == ("wait: gen", 1.0, 0.5)
    assert (work.start_s, work.seconds) == (1.5, 1.5)
    assert work.about == {"iteration": 0, "optimizer_s": 0.25, "tokens": 7}


def test_a_tenth_of_the_link_between_nodes_changes_the_plan(tmp_path: Path):
    """Two nodes of two: what crosses them when links are alike stays inside them when they are not."""
    base = load_profile("a100-80gb")
    even = replace(base, inter_node=base.intra_node)
    link = base.intra_node
    tenth = [
        (name, tuple(replace(row, bytes_per_s=row.bytes_per_s / 10) for row in rows))
        for name, rows in link.collectives
    ]
    slow = replace(base, inter_node=Link(link.latency_s, link.bytes_per_s / 10, tuple(tenth)))
    crossing = {}
    seconds = {}
    for name, profile in (("even", even), ("slow", slow)):
        write_profile(profile, tmp_path / f"{name}.yaml")
        cluster = Cluster(2, 2, str(tmp_path / f"{name}.yaml"))
        result = search_plan(experiment(sequences=32), cluster, time_limit_s=4)
        crossing[name] = result.plan.placements
        seconds[name] = result.iteration_s
    assert crossing["even"] != crossing["slow"]
    # the plan that was best on even links loses to the new one on the slow link
    stale = ExecutionPlan(
        experiment(sequences=32), Cluster(2, 2, str(tmp_path / "slow.yaml")), crossing["even"]
    )
    assert assess(stale).iteration_s > seconds["slow"]
