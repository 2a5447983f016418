"""DeepSpeed as the training backend gives what the own backend gives, under every ZeRO stage."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from planner.api import search_plan
from realloc.cluster import Cluster
from realloc.errors import InputError, PlanError
from realloc.experiment import parse_experiment
from realloc.files import Reader
from tests.ranks.engine import assert_same, make_plan, ppo_content, run, write_models

TINY = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48}
installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install '.[deepspeed]'"
)


@installed
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "strategies",
    [
        # ragged shares, one rank without a sequence of its own now and then, moves to other layouts
        {"actor_train": "d2t1p1m2z1", "critic_train": "d2t1p1z2"},
        {"actor_train": "d2t1p1z3", "critic_train": "d2t1p1m2z3"},
        {"actor_train": "d2t1p1z1+offload", "critic_train": "d2t1p1m3"},
    ],
    ids=["zero 1 and 2", "zero 3", "offload and zero 0"],
)
def test_equal_to_own_backend(tmp_path: Path, strategies: dict[str, str]):
    models = write_models(tmp_path, **TINY)
    placements = {call: ("node0", strategy) for call, strategy in strategies.items()}
    placements |= {"*": ("node0:gpu[0]", "d1t1p1"), "actor_gen": ("node0", "d1t2p1")}
    own = make_plan(tmp_path, ppo_content(tmp_path, models), 2, placements)
    expected = run(own, tmp_path / "own")
    changed = ppo_content(tmp_path, models, training_backend="deepspeed")
    actual = run(make_plan(tmp_path, changed, 2, placements), tmp_path / "deepspeed", timeout_s=250)
    assert_same(actual, expected)


@pytest.mark.parametrize(
    "mesh, strategy, words", [("node0", "d1t2p1", "tp 2"), ("node0:gpu[1]", "d1t1p1", "all 2 GPUs")]
)
def test_refuses_what_it_cannot_train(tmp_path: Path, mesh: str, strategy: str, words: str):
    models = write_models(tmp_path, **TINY)
    content = ppo_content(tmp_path, models, training_backend="deepspeed")
    with pytest.raises(PlanError, match=words):
        make_plan(tmp_path, content, 2, {"*": ("node0", "d2t1p1"), "actor_train": (mesh, strategy)})


def test_searched_plans_train_on_the_whole_cluster_by_data_parallelism(tmp_path: Path):
    models = write_models(tmp_path, **TINY)
    content = ppo_content(tmp_path, models, training_backend="deepspeed")
    experiment = parse_experiment(Reader(content, "experiment"), tmp_path)
    plan = search_plan(experiment, Cluster(1, 4, "cpu"), time_limit_s=2.0).plan
    for call in ("actor_train", "critic_train"):
        placement = plan.placements[call]
        assert (placement.mesh.size, placement.strategy.dp) == (4, 4)


def test_refuses_bfloat16(tmp_path: Path):
    models = write_models(tmp_path, **TINY)
    content = ppo_content(tmp_path, models, training_backend="deepspeed", dtype="bfloat16")
    with pytest.raises(InputError, match="trains in float32"):
        parse_experiment(Reader(content, "experiment"), tmp_path)
