"""Every algorithm computes on any plan what one process computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.engine import assert_same, make_plan, ppo_content, run, write_models

ALONE: Mapping[str, tuple[str, str]] = {"*": ("node0", "d1t1p1")}
SHAPE = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48}
# groups of samples split over replicas, meshes that differ, pipelines
PLANS: Mapping[str, tuple[int, Mapping[str, tuple[str, str]]]] = {
    "replicas": (3, {"*": ("node0", "d3t1p1m2")}),
    "apart": (
        4,
        {
            "*": ("node0:gpu[0-1]", "d1t2p1m2"),
            "actor_gen": ("node0", "d2t1p2m2"),
            "actor_train": ("node0:gpu[2-3]", "d2t1p1m2z1"),
        },
    ),
}
ALGORITHMS: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "grpo": (("actor", "ref", "reward"), {"kl_coef": 0.04, "mini_batches": 2}),
    "grpo without reference": (
        ("actor", "reward"),
        {"kl_coef": 0, "scale": "batch", "aggregation": "token", "overlong_buffer": 4},
    ),
    "rloo": (("actor", "ref", "reward"), {"mini_batches": 2}),
    "remax": (("actor", "ref", "reward"), {"mini_batches": 2}),
    "reinforce_pp": (("actor", "ref", "reward"), {"epochs": 2, "group_baseline": True}),
}


def content(folder: Path, algorithm: str) -> dict[str, Any]:
    roles, hyperparameters = ALGORITHMS[algorithm]
    models = write_models(folder, **SHAPE)
    result = ppo_content(folder, {role: models[role] for role in roles})
    result["workload"]["samples_per_prompt"] = 4
    return result | {"algorithm": algorithm.split(maxsplit=1)[0], "hyperparameters": dict(hyperparameters)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plans_change_nothing(tmp_path: Path, algorithm: str) -> None:
    experiment = content(tmp_path, algorithm)
    expected = run(make_plan(tmp_path, experiment, 1, ALONE), tmp_path / "alone")
    losses = [metrics["actor_train/loss"] for metrics in expected.metrics]
    assert len(set(losses)) == len(losses), "every iteration has a loss of its own"
    for name, (gpus, placements) in PLANS.items():
        plan = make_plan(tmp_path, experiment, gpus, placements)
        assert_same(run(plan, tmp_path / name), expected)
