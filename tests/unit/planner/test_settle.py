"""On a host whose cores are shared, the plan that a search returns is no slower than those it lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cost_models.curve import Curve
from cost_models.profile import load_profile, write_profile
from planner import api
from planner.predict import assess
from planner.result import SearchResult
from realloc.cluster import Cluster
from realloc.experiment import parse_experiment
from realloc.files import Reader

CONTENT = {
    "algorithm": "ppo",
    "models": dict.fromkeys(("actor", "critic", "ref", "reward"), "qwen2.5-0.5b"),
    "workload": {"sequences": 32, "prompt_tokens": 32, "response_tokens": 64},
}


def search(folder: Path, slowdown: float) -> SearchResult:
    """On two ranks, each of which takes `slowdown` times as long while the other computes."""
    profile = replace(load_profile("cpu"), concurrency=Curve(((1.0, 1.0), (2.0, slowdown))))
    path = folder / "profile.yaml"
    write_profile(profile, path)
    experiment = parse_experiment(Reader(CONTENT, "experiment"), folder)
    return api.search_plan(experiment, Cluster(1, 2, str(path), 1 << 36), time_limit_s=3.0)


@pytest.mark.parametrize("slowdown", [1.0, 1.6, 2.0])
def test_none_of_the_runners_up_is_faster(tmp_path: Path, slowdown: float) -> None:
    result = search(tmp_path, slowdown)
    assert result.plan.predictions is not None
    assert result.iteration_s == pytest.approx(result.plan.predictions.iteration_s)
    assert result.iteration_s == pytest.approx(assess(result.plan).iteration_s)
    assert result.lower_bound_s <= result.iteration_s * (1 + 1e-9)
    listed = [item for item in result.runners_up if item.iteration_s is not None]
    assert listed
    for item in listed:
        assert item.iteration_s is not None
        assert item.iteration_s >= result.iteration_s * 0.998, item.name
        again = assess(replace(result.plan, placements=item.placements, order=item.order))
        assert item.iteration_s == pytest.approx(again.iteration_s)


def test_shared_cores_cost_time_and_proofs(tmp_path: Path) -> None:
    alone, shared = (search(tmp_path, slowdown) for slowdown in (1.0, 2.0))
    assert shared.iteration_s >= alone.iteration_s
    assert not (shared.proven and shared.iteration_s > shared.lower_bound_s * (1 + 1e-6))
