"""Constraints: read strictly, written back equal, contradictions name each other, plans are held to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from realloc.augmented import Placement
from realloc.clauses import Clauses
from realloc.cluster import Cluster
from realloc.constraints import constraints_content, parse_constraints
from realloc.errors import InputError, PlanError
from realloc.experiment import read_experiment
from realloc.files import Reader
from realloc.mesh import parse_mesh
from realloc.plan import plan_text, read_plan
from realloc.strategy import parse_strategy
from tests.unit.realloc.make import experiment_mapping, plan_mapping, small_graph, write

CLUSTER = Cluster(4, 8, "x")
EVERYTHING = {
    "reserve": ["node3", "node0:gpu[0-3]"],
    "all": {"tp": {"max": 4}, "offload": False},
    "roles": {"actor": {"pp": [1, 2]}, "reward": {"mesh": ["node1", "node2"]}},
    "calls": {
        "gen": {"micro_batches": {"min": 2}, "forbid": ["d8t1p1m2", {"tp": 2, "dp": {"min": 4}}]},
        "train": {"recompute": "full", "zero": [1, 3]},
    },
}  # fmt: skip


def clauses(content: dict[str, Any]) -> Clauses:
    return Clauses(parse_constraints(Reader(content, "constraints")), small_graph(), CLUSTER)


def placement(mesh: str, strategy: str) -> Placement:
    return Placement(parse_mesh(mesh, CLUSTER, "test"), parse_strategy(strategy, "test"))


def test_content_reads_back_to_an_equal_value() -> None:
    constraints = parse_constraints(Reader(EVERYTHING, "constraints"))
    assert constraints_content(constraints) == EVERYTHING
    assert parse_constraints(Reader(constraints_content(constraints), "again")) == constraints


@pytest.mark.parametrize(
    "call, mesh, strategy, refused",
    [
        ("gen", "node1", "d4t1p2m2", None),
        ("gen", "node1", "d1t8p1m2", "all.tp {max: 4}"),
        ("gen", "node3", "d4t1p2m2", "reserve node[3]"),
        ("gen", "node0", "d4t1p2m2", "reserve node0:gpu[0-3]"),
        ("gen", "node0:gpu[4-7]", "d2t1p2m2", None),
        ("gen", "node1", "d4t1p2m2+offload", "all.offload false"),
        ("gen", "node1", "d2t1p4m4", "roles.actor.pp [1, 2]"),
        ("gen", "node1", "d4t1p2", "calls.gen.micro_batches {min: 2}"),
        ("gen", "node1", "d8t1p1m2", "calls.gen.forbid d8t1p1m2"),
        ("gen", "node1", "d4t2p1m2", "calls.gen.forbid {dp {min: 4}, tp 2}"),
        ("gen", "node1", "d2t2p2m2", None),
        ("score", "node1", "d2t1p4", None),
        ("score", "node[1-2]", "d16t1p1", "roles.reward.mesh node[1] or node[2]"),
        ("train", "node2", "d4t2p1z1+full", None),
        ("train", "node2", "d4t2p1z2+full", "calls.train.zero [1, 3]"),
        ("train", "node2", "d4t2p1z3", "calls.train.recompute full"),
    ],
)
def test_each_clause_refuses_what_it_says(call, mesh, strategy, refused) -> None:
    assert clauses(EVERYTHING).refuses(call, placement(mesh, strategy)) == refused


@pytest.mark.parametrize(
    "content, first, second",
    [
        (
            {"all": {"tp": {"max": 2}}, "calls": {"gen": {"tp": {"min": 4}}}},
            "all.tp {max: 2}",
            "calls.gen.tp {min: 4}",
        ),
        (
            {"reserve": ["node0"], "calls": {"gen": {"mesh": "node[0-1]"}}},
            "reserve node[0]",
            "calls.gen.mesh node[0-1]",
        ),
        (
            {"roles": {"actor": {"mesh": "node0"}}, "calls": {"gen": {"mesh": "node1"}}},
            "roles.actor.mesh node[0]",
            "calls.gen.mesh node[1]",
        ),
        (
            {"calls": {"train": {"zero": 3, "pp": {"min": 2}}}},
            "calls.train.pp {min: 2}",
            "calls.train.zero 3",
        ),
        ({"calls": {"train": {"schedule": "zero_bubble", "pp": 1}}}, "calls.train.pp 1", "zero_bubble"),
        ({"calls": {"gen": {"mesh": "node0", "tp": 16}}}, "calls.gen.mesh node[0]", "calls.gen.tp 16"),
        (
            {"calls": {"train": {"sequence_parallel": True, "tp": 1}}},
            "calls.train.tp 1",
            "sequence_parallel true",
        ),
        (
            {"calls": {"gen": {"tp": 2, "forbid": [{"tp": {"max": 4}}]}}},
            "calls.gen.tp 2",
            "forbid {tp {max: 4}}",
        ),
    ],
)
def test_contradictions_name_each_other(content, first, second) -> None:
    with pytest.raises(InputError) as caught:
        clauses(content)
    message = str(caught.value)
    assert first in message
    assert second in message
    assert "contradict each other" in message


def test_three_clauses_of_which_any_two_can_hold() -> None:
    content = {"calls": {"train": {"mesh": "node0", "dp": {"min": 4}, "tp": {"min": 2}, "pp": {"min": 2}}}}
    with pytest.raises(InputError, match=r"mesh node\[0\].*dp.*tp.*pp.*contradict"):
        clauses(content)


def test_reserving_everything() -> None:
    with pytest.raises(InputError, match=r"reserve node\[0-3\] leaves nothing"):
        clauses({"reserve": ["node[0-3]"]})


def test_a_field_of_all_means_the_calls_that_have_a_use_for_it() -> None:
    found = clauses({"all": {"recompute": "full", "zero": 3}})
    assert found.refuses("gen", placement("node0", "d8t1p1")) is None
    assert found.refuses("train", placement("node0", "d8t1p1")) is not None


@pytest.mark.parametrize(
    "constraints, words",
    [
        ({"calls": {"actor_generate": {}}}, ["actor_generate", "Did you mean 'actor_gen'"]),
        ({"roles": {"actr": {}}}, ["actr", "Did you mean 'actor'"]),
        ({"calls": {"actor_gen": {"zero": 3}}}, ["actor_gen.zero", "no use for it"]),
        ({"calls": {"actor_gen": {"tpp": 3}}}, ["unknown key 'tpp'", "'tp'"]),
        ({"all": {"tp": {"max": 2, "min": 4}}}, ["all.tp", "min 4 exceeds max 2"]),
        ({"all": {"tp": {}}}, ["all.tp", "give min, max or both"]),
        ({"all": {"tp": []}}, ["all.tp", "empty"]),
        ({"all": {"zero": 4}}, ["all.zero", "4"]),
        ({"all": {"offload": {"max": 1}}}, ["all.offload", "not a number"]),
        ({"all": {"recompute": "ful"}}, ["recompute", "Did you mean 'full'"]),
        ({"all": {"forbid": [{}]}}, ["forbid[0]", "forbids nothing"]),
        ({"all": {"forbid": ["d2t"]}}, ["forbid[0]", "d2t"]),
        ({"reserve": [1]}, ["reserve", "text"]),
    ],
)
def test_what_is_refused_when_read(tmp_path: Path, constraints, words) -> None:
    path = write(tmp_path / "e.yaml", experiment_mapping() | {"constraints": constraints})
    with pytest.raises(InputError) as caught:
        read_experiment(path)
    for word in words:
        assert word in str(caught.value)


def test_plans_are_held_to_constraints_and_carry_them(tmp_path: Path) -> None:
    content = plan_mapping()
    content["experiment"]["constraints"] = {"all": {"tp": {"max": 8}}}
    plan = read_plan(write(tmp_path / "plan.yaml", content))
    assert read_plan(write(tmp_path / "again.yaml", plan_text(plan))).experiment == plan.experiment
    content["experiment"]["constraints"] = {"roles": {"reward": {"tp": 1}}}
    with pytest.raises(PlanError) as caught:
        read_plan(write(tmp_path / "bad.yaml", content))
    assert "placements.rew_inf: node1:gpu[0-3] d2t2p1m4" in str(caught.value)
    assert "roles.reward.tp 1" in str(caught.value)


def test_the_documented_example_is_one() -> None:
    text = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    example = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    constraints = parse_constraints(Reader(example["constraints"], "docs"))
    assert constraints_content(constraints) == example["constraints"] | {
        "roles": {"reward": {"mesh": "node1"}},
    }
    assert len(constraints.calls) == 2
