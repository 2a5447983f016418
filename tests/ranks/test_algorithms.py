"""Every algorithm computes on any plan what one process computes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log, nan
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from experiments import toy
from tests.ranks.engine import ITERATIONS, assert_same, make_plan, ppo_content, run, write_models
from tests.ranks.launch import RankFailure
from tests.tiny import write_tiny_llama

ALONE: Mapping[str, tuple[str, str]] = {"*": ("node0", "d1t1p1")}
OPTIMIZER = {"learning_rate": 2e-3, "eps": 1e-5}
SHAPE: Mapping[str, Any] = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48}
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
    "raft": (("actor", "reward"), {"keep": 2}),
    "iterative_dpo": (("actor", "ref", "reward"), {}),
    "dpo": (("actor", "ref"), {"mini_batches": 2, "epochs": 2}),
    "reward": (("reward",), {"mini_batches": 2, "centre_coef": 0.1}),
    "reward with a new head": (("reward",), {}),
}
SEVERAL: Sequence[Mapping[str, Any]] = (
    {"model": "reward_a", "weight": 0.3},
    {"model": "reward_b", "weight": -0.2},
    {"function": "experiments.rewards:sentiment", "weight": 2.0},
    {"verifier": "length", "minimum": 6, "weight": 0.5},
)
PICKY: Sequence[Mapping[str, Any]] = (
    {"function": "tests.ranks.picky:score", "on_failure": "skip"},
    {"model": "reward_a", "weight": 0.3},
)
REWARDS: Mapping[str, tuple[str, tuple[str, ...], Sequence[Mapping[str, Any]]]] = {
    "ppo, several rewards": ("ppo", ("actor", "critic", "ref", "reward_a", "reward_b"), SEVERAL),
    "remax, several rewards": ("remax", ("actor", "ref", "reward_a", "reward_b"), SEVERAL),
    "ppo, samples left out": ("ppo", ("actor", "critic", "ref", "reward_a"), PICKY),
    "grpo, samples left out": ("grpo", ("actor", "ref", "reward_a"), PICKY),
    "raft, samples left out": ("raft", ("actor",), PICKY[:1]),
    "iterative_dpo, samples left out": ("iterative_dpo", ("actor", "ref"), PICKY[:1]),
}


def content(folder: Path, algorithm: str) -> dict[str, Any]:
    roles, hyperparameters = ALGORITHMS[algorithm]
    models = models_for(folder, algorithm)
    result = ppo_content(folder, {role: models[role] for role in roles})
    result["workload"]["samples_per_prompt"] = 4
    if algorithm.split(maxsplit=1)[0] in ("dpo", "reward"):
        result["workload"]["samples_per_prompt"] = 2
        result["data"] = write_pairs(folder)
        result["models"] = {role: {"path": models[role], "optimizer": OPTIMIZER} for role in roles}
    return result | {"algorithm": algorithm.split(maxsplit=1)[0], "hyperparameters": dict(hyperparameters)}


def models_for(folder: Path, algorithm: str) -> dict[str, str]:
    models = dict(write_models(folder, **SHAPE))
    if "dpo" in algorithm:  # with a reference equal to the actor, rounding decides which of a pair is ahead
        write_tiny_llama(folder / "ref", vocab=len(toy.vocabulary()), seed=9, head="lm", **SHAPE)
        toy.write_tokenizer(folder / "ref")
    if "new head" in algorithm:  # on large hidden states
        models["reward"] = models["actor"]
        weights = load_file(folder / "actor" / "model.safetensors")
        weights["model.norm.weight"] *= 10.0
        save_file(weights, folder / "actor" / "model.safetensors", {"format": "pt"})
    return models


def write_pairs(folder: Path) -> Mapping[str, str]:
    """Preferences made of the toy stories: each one against the next one's."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    pairs = (
        {"prompt": row["prompt"], "chosen": row["story"], "rejected": other["story"]}
        for row, other in pairwise(rows)
    )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {"path": str(path), "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plans_change_nothing(tmp_path: Path, algorithm: str) -> None:
    experiment = content(tmp_path, algorithm)
    expected = run(make_plan(tmp_path, experiment, 1, ALONE), tmp_path / "alone")
    trained = "reward_train" if algorithm.startswith("reward") else "actor_train"
    losses = [metrics[f"{trained}/loss"] for metrics in expected.metrics]
    if "new head" in algorithm:
        assert losses[0] == pytest.approx(log(2), abs=0.05)
    assert len(set(losses)) == len(losses), "every iteration has a loss of its own"
    for name, (gpus, placements) in PLANS.items():
        plan = make_plan(tmp_path, experiment, gpus, placements)
        assert_same(run(plan, tmp_path / name), expected)


@pytest.mark.parametrize("name", REWARDS)
def test_several_rewards_and_samples_without_one(tmp_path: Path, name: str) -> None:
    algorithm, roles, rewards = REWARDS[name]
    models = models_for(tmp_path, algorithm)
    models |= {"reward_a": models["reward"], "reward_b": models["critic"]}
    experiment = ppo_content(tmp_path, {role: models[role] for role in roles}, algorithm=algorithm)
    experiment["workload"]["samples_per_prompt"] = 4
    experiment |= {"rewards": [dict(reward) for reward in rewards]}
    expected = run(make_plan(tmp_path, experiment, 1, ALONE), tmp_path / "alone")
    if rewards is SEVERAL:
        for metrics in expected.metrics:
            parts = (
                0.3 * metrics["reward_a_inf/reward_a_scores"]
                - 0.2 * metrics["reward_b_inf/reward_b_scores"]
                + 2.0 * metrics["rew_functions/sentiment"]
                + 0.5 * metrics["rew_functions/length"]
            )
            assert metrics["rew_sum/scores"] == pytest.approx(parts, rel=1e-5)
    else:
        skipped = [v for m in expected.metrics for k, v in m.items() if k.endswith("/skipped")]
        assert all(0 < count < 12 for count in skipped), skipped
        assert len(skipped) == len(expected.metrics)
    gpus, placements = PLANS["apart"]
    assert_same(run(make_plan(tmp_path, experiment, gpus, placements), tmp_path / "apart"), expected)


EVALUATED: Mapping[str, tuple[str, tuple[str, ...], Mapping[str, Any], Sequence[str]]] = {
    "ppo": (
        "ppo",
        ("actor", "critic", "ref", "reward"),
        {"win_rate": True, "sampled": True, "gold": "experiments.rewards:sentiment"},
        (
            "length",
            "kl",
            "reward",
            "reference_reward",
            "win_rate",
            "gold",
            "best_of_2",
            "gold_best_of_2",
        ),
    ),
    "raft": ("raft", ("actor", "reward"), {}, ("length", "reward")),
    "reward": (
        "reward",
        ("reward",),
        {"gold": "experiments.rewards:sentiment"},
        ("accuracy", "margin", "loss", "calibration", "spearman", "kendall", "best_of_2"),
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_the_same_on_every_plan(tmp_path: Path, name: str) -> None:
    algorithm, roles, options, reported = EVALUATED[name]
    if algorithm == "reward":
        experiment = content(tmp_path, algorithm)
    else:
        models = models_for(tmp_path, algorithm)
        experiment = ppo_content(tmp_path, {role: models[role] for role in roles}, algorithm=algorithm)
        experiment["workload"]["samples_per_prompt"] = 2
        experiment["hyperparameters"] = {}
    experiment["data"] = {**experiment["data"], "holdout": 0.3}
    plain = run(make_plan(tmp_path, experiment, 1, ALONE), tmp_path / "plain")
    experiment |= {"evaluation": {"every": 2, **options}}
    expected = run(make_plan(tmp_path, experiment, 1, ALONE), tmp_path / "alone")
    *during, trained_models = expected.metrics
    for iteration, metrics in enumerate(during):
        found = {key.partition("/")[2] for key in metrics if key.startswith("evaluation/")}
        assert found == ({*reported, "tokens"} if iteration % 2 == 0 else set())
        trained = {key: value for key, value in metrics.items() if key in plain.metrics[iteration]}
        assert trained == plain.metrics[iteration], "evaluation changes nothing of training"
    longer = experiment | {"iterations": ITERATIONS + 1, "evaluation": {"every": ITERATIONS, **options}}
    beyond = run(make_plan(tmp_path, longer, 1, ALONE), tmp_path / "longer").metrics[ITERATIONS]
    judged = {key for key in beyond if key.startswith(("evaluation/", "eval_", "rival_"))}
    assert trained_models == {key: beyond[key] for key in judged}, (
        "the last evaluation is of what was learned"
    )
    gpus, placements = PLANS["apart"]
    placements = {
        **placements,
        "evaluation": ("node0", "d4t1p1"),
        "eval_actor_gen": ("node0", "d1t2p2+offload"),
        "eval_ref_gen": ("node0", "d2t2p1+offload"),
        "rival_rew_inf": ("node0", "d2t1p2+offload"),
    }
    assert_same(run(make_plan(tmp_path, experiment, gpus, placements), tmp_path / "apart"), expected)


def test_a_batch_without_any_score_is_an_error(tmp_path: Path) -> None:
    models = models_for(tmp_path, "grpo")
    experiment = ppo_content(tmp_path, {role: models[role] for role in ("actor", "ref")}, algorithm="grpo")
    experiment["workload"]["samples_per_prompt"] = 4
    experiment["rewards"] = [{"function": "tests.ranks.picky:none", "on_failure": "skip"}]
    gpus, placements = PLANS["replicas"]
    with pytest.raises(RankFailure, match="none of the 12 samples of this iteration has a score"):
        run(make_plan(tmp_path, experiment, gpus, placements), tmp_path / "run")


def test_a_reward_model_that_gives_no_number_is_an_error(tmp_path: Path) -> None:
    models = models_for(tmp_path, "grpo")
    path = Path(models["reward"]) / "model.safetensors"
    weights = load_file(path)
    weights["score.weight"][:] = nan
    save_file(weights, path, {"format": "pt"})
    roles = ("actor", "ref", "reward")
    experiment = ppo_content(tmp_path, {role: models[role] for role in roles}, algorithm="grpo")
    experiment["workload"]["samples_per_prompt"] = 4
    with pytest.raises(RankFailure, match=r"rew_inf: the model's score of sample 0 is nan"):
        run(make_plan(tmp_path, experiment, 1, ALONE), tmp_path / "run")
