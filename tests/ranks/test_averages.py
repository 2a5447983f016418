"""A reference that follows the actor: mixed in once an iteration, whatever the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from realloc.layout import Box
from runtime.averages import Mixing
from runtime.parameters import allocate
from tests.ranks.engine import assert_same, make_plan, ppo_content, run, write_models

SHAPE: Mapping[str, Any] = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48}
ALONE: Mapping[str, tuple[str, str]] = {"*": ("node0", "d1t1p1")}
PLANS: Mapping[str, tuple[int, Mapping[str, tuple[str, str]]]] = {
    "layouts that are the same": (2, {"*": ("node0", "d2t1p1")}),
    "apart": (
        4,
        {
            "*": ("node0", "d2t2p1"),
            "ref_inf": ("node0:gpu[2-3]", "d1t1p2m2"),
            "actor_train": ("node0:gpu[0-1]", "d2t1p1z1"),
            "actor_gen": ("node0:gpu[0-1]", "d2t1p1"),
        },
    ),
}


def content(folder: Path, decay: float) -> dict[str, Any]:
    hyperparameters = {"mini_batches": 2, "ref_ema_decay": decay}
    return ppo_content(folder, write_models(folder, **SHAPE), hyperparameters=hyperparameters)


def test_the_average_is_mixed_in_place() -> None:
    boxes = {"a": Box((0,), (3,)), "b": Box((2, 0), (4, 2))}
    params = allocate(boxes, torch.float32, torch.device("cpu"))
    params.flat.copy_(torch.arange(7.0))
    mixing = Mixing(params, 0.9)
    mixing.news.tensors["a"].fill_(10.0)
    mixing.news.tensors["b"].fill_(-10.0)
    mixing.mix()
    torch.testing.assert_close(params.views["a"], 0.9 * torch.arange(3.0) + 1.0)
    torch.testing.assert_close(params.views["b"].flatten(), 0.9 * torch.arange(3.0, 7.0) - 1.0)


def test_a_reference_without_memory_is_the_actor_that_generates(tmp_path: Path) -> None:
    """It becomes the actor after each iteration, so that nothing is ever diverged from."""
    outcomes = {
        decay: run(make_plan(tmp_path, content(tmp_path, decay), 1, ALONE), tmp_path / str(decay))
        for decay in (0.0, 0.5, 1.0)
    }
    kls = {d: [abs(m["actor_train/ref_kl"]) for m in o.metrics] for d, o in outcomes.items()}
    assert max(kls[0.0]) < 1e-6
    for iteration in (1, 2):
        assert kls[0.0][iteration] < kls[0.5][iteration]
    assert kls[0.5][2] != pytest.approx(kls[1.0][2], rel=0.05)


def test_plans_change_nothing(tmp_path: Path) -> None:
    experiment = content(tmp_path, 0.5)
    expected = run(make_plan(tmp_path, experiment, 1, ALONE), tmp_path / "alone")
    for name, (gpus, placements) in PLANS.items():
        plan = make_plan(tmp_path, experiment, gpus, placements)
        assert "reallocate:ref:ref_inf" in plan.node_order
        assert_same(run(plan, tmp_path / name), expected)
