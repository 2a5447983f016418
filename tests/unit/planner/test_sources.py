"""A plan says what stands behind its seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cost_models.curve import Curve
from cost_models.profile import Provenance, read_profile, write_profile
from cost_models.tables import Row, Table
from planner.predict import beyond_measured, predict
from realloc.cluster import Cluster
from realloc.plan import ExecutionPlan, read_plan, write_plan
from realloc.signature import layer_signature
from tests.unit.cost_models.cases import experiment, place, profile


def test_a_plan_keeps_what_was_measured_extrapolated_or_analytic(tmp_path: Path):
    made = experiment("pythia-14m", sequences=8, prompt=16, response=16, dtype="float32")
    named = {role: replace(spec, model="pythia-14m") for role, spec in made.models.items()}
    made = replace(made, models=named)
    shape = named["actor"].shape
    rows = tuple(Row(count, 32, count * 1e-3) for count in (1, 2))
    tables = (Table(layer_signature(shape, 1), "float32", "inference", 0.0, rows),)
    hardware = tmp_path / "here.yaml"
    write_profile(replace(profile(), name="here", tables=tables), hardware)
    graph = made.graph()
    placements = {call.name: place("d4t1p1", per_node=4) for call in graph.calls}
    placements["ref_inf"] = place("d1t1p1", per_node=4)
    placements["rew_inf"] = place("d1t4p1", per_node=4)
    cluster = Cluster(1, 4, str(hardware))
    plan = predict(ExecutionPlan(made, cluster, placements))
    assert plan.predictions is not None
    sources = plan.predictions.sources
    # four replicas of two sequences: within the table; all eight on one rank: beyond it
    assert "measured: inference" in sources["critic_inf"]
    assert "extrapolated: inference (8 x 32, measured sequences 1 to 2, tokens_each 32)" in sources["ref_inf"]
    assert sources["rew_inf"].startswith(f"analytic: no tables of '{layer_signature(shape, 4)}'")
    assert "scaled: backward (from forward)" not in sources["actor_train"]
    assert "scaled: backward (from inference), forward (from inference)" in sources["actor_train"]
    text = beyond_measured(sources)
    assert "ref_inf: " in text
    assert "measured: inference;" not in text

    write_plan(plan, tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "plan.yaml").predictions
    assert again is not None
    assert again.sources == sources


def test_a_plan_says_which_messages_were_measured(tmp_path: Path):
    """A profile of one node with two ranks, asked for two nodes of four: nothing of that is silent."""
    made = experiment("pythia-14m", sequences=8, prompt=16, response=16, dtype="float32")
    named = {role: replace(spec, model="pythia-14m") for role, spec in made.models.items()}
    made = replace(made, models=named)
    base = profile()
    here = replace(
        base,
        name="here",
        provenance=Provenance("measured", "a round device", "2026-01-01"),
        attention=replace(base.attention, per_sequence=True),
        concurrency=Curve(((1.0, 1.0), (2.0, 1.3))),
        inter_node=replace(base.inter_node, estimate="as in one node"),
    )
    hardware = tmp_path / "here.yaml"
    write_profile(here, hardware)
    assert read_profile(hardware).inter_node == here.inter_node
    graph = made.graph()
    placements = {call.name: place("d1t2p1", per_node=4) for call in graph.calls}
    placements["ref_inf"] = place("d1t4p1", per_node=4)
    placements["actor_train"] = place("d2t1p4m2", per_node=4)
    plan = predict(ExecutionPlan(made, Cluster(2, 4, str(hardware)), placements))
    assert plan.predictions is not None
    sources = plan.predictions.sources
    assert "measured: all_gather" not in sources["critic_inf"]
    assert "measured: all_reduce" in sources["critic_inf"]
    assert (
        "extrapolated: 4 ranks on a host (measured up to 2), all_reduce (groups of 4, measured 2)"
        in (sources["ref_inf"])
    )
    assert (
        "analytic: all_reduce across nodes (as in one node), messages across nodes (as in one node)"
        in (sources["actor_train"])
    )
    assert sources["transfer"] == (
        "measured: messages; analytic: messages across nodes (as in one node), work beside messages "
        "(taken as none)"
    )
    assert "across nodes" in sources["reallocate"]
    assert "across nodes (as in one node)" in beyond_measured(sources)
