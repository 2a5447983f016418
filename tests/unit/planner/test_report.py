"""The report says what was chosen, in 100 columns and in JSON."""

from __future__ import annotations

import json

import pytest

from planner.report import report_json, report_text
from planner.search import methods
from realloc.cluster import Cluster
from tests.unit.planner.problems import make_problem, ppo_graph


@pytest.fixture(scope="module")
def result():
    problem = make_problem(ppo_graph(), Cluster(2, 4, "x"), 7, bytes_scale=300.0)
    return methods()["auto"](problem, 60.0, 0)


def test_text(result):
    text = report_text(result)
    assert max(map(len, text.splitlines())) <= 100
    for name, placement in result.plan.placements.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert str(placement.mesh) in line
        assert str(placement.strategy) in line
    assert f"{result.iteration_s:.4g} s per iteration" in text
    assert "Peak memory:" in text
    assert "Why others lost:" in text
    assert "all GPUs, one strategy for all calls" in text
    assert "Placements left out:" in text
    assert "tp leaves its node (such as actor_gen d1t8p1" in text


def test_alternatives_are_no_faster_and_differ_in_one_call(result):
    assert {a.call for a in result.runners_up} >= set(result.plan.placements)
    for item in result.runners_up:
        if item.iteration_s is not None:
            assert item.iteration_s >= result.iteration_s * (1 - 1e-9)
        if item.call is not None:
            changed = [n for n, p in item.placements.items() if p != result.plan.placements[n]]
            assert changed == [item.call]


def test_json(result):
    content = json.loads(report_json(result))
    assert content["iteration_s"] == result.iteration_s
    assert content["placements"].keys() == result.plan.placements.keys()
    assert sum(content["memory"]["by_cause_bytes"].values()) == content["memory"]["peak_bytes"]
    assert set(content["order"]) == set(content["node_s"])
