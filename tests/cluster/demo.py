"""The demo's experiment, planned by hand for 2 nodes of 2 ranks and for 1 node of 4, alike in all else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tests.ranks.engine import read_weights

REPOSITORY = Path(__file__).parents[2]
ITERATIONS = 2
# of two nodes, and the same ranks of one
EVERYWHERE, FIRST, SECOND = ("node[0-1]", "node0"), ("node0", "node0:gpu[0-1]"), ("node1", "node0:gpu[2-3]")
PLACEMENTS = {
    "actor_gen": (EVERYWHERE, "d2t2p1"),
    "rew_inf": (FIRST, "d2t1p1"),
    "ref_inf": (SECOND, "d1t2p1"),
    "critic_inf": (SECOND, "d2t1p1"),
    "actor_train": (EVERYWHERE, "d2t1p2m2"),
    "critic_train": (FIRST, "d2t1p1"),
}


def write_plans(folder: Path) -> tuple[Path, Path]:
    """`two.yaml` for 2 nodes x 2 ranks and `one.yaml` for 1 node x 4 ranks, the same ranks for every call."""
    return _write(folder / "two.yaml", 2, 0), _write(folder / "one.yaml", 1, 1)


def _write(path: Path, nodes: int, form: int) -> Path:
    demo = REPOSITORY / "experiments" / "demo"
    experiment = yaml.safe_load((demo / "experiment.yaml").read_text())
    for key in ("realloc", "cluster"):
        experiment.pop(key)
    experiment["models"] = {role: _absolute(demo, spec) for role, spec in experiment["models"].items()}
    experiment["data"]["path"] = str(demo / experiment["data"]["path"])
    experiment["workload"]["sequences"] = 16
    experiment["iterations"] = ITERATIONS
    placements = {
        call: {"mesh": meshes[form], "strategy": strategy} for call, (meshes, strategy) in PLACEMENTS.items()
    }
    content = {
        "realloc": "plan/1",
        "experiment": experiment,
        "cluster": {"nodes": nodes, "gpus_per_node": 4 // nodes, "device": "cpu"},
        "placements": placements,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def _absolute(folder: Path, spec: Any) -> Any:
    if isinstance(spec, str):
        return str(folder / spec)
    return spec | {"path": str(folder / spec["path"])}


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY)} | more


def results(out: Path) -> tuple[list[dict[str, float]], Mapping[str, Mapping[str, NDArray[Any]]]]:
    """Metrics of every iteration without times, and the trained weights by role."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_s")}
        for record in records
    ]
    return metrics, {role.name: read_weights(role) for role in sorted((out / "models").iterdir())}


def assert_equal_runs(mine: Path, other: Path) -> None:
    """The same metrics and weights within 1e-5 relative: sums over hosts may be taken in another order."""
    (got, got_weights), (want, want_weights) = results(mine), results(other)
    assert len(got) == len(want) == ITERATIONS
    for left, right in zip(got, want, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert abs(left[name] - value) <= 1e-5 * max(abs(value), 1e-2), (name, left[name], value)
    assert got_weights.keys() == want_weights.keys()
    for role, tensors in want_weights.items():
        for name, tensor in tensors.items():
            np.testing.assert_allclose(
                got_weights[role][name], tensor, rtol=1e-5, atol=1e-6, err_msg=f"{role} {name}"
            )
