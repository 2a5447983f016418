"""Calls that select: the sequences chosen by hand are those that are trained on, on any plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from realloc.functions import Sample
from tests.ranks.engine import assert_same, make_plan, ppo_content, run
from tests.ranks.test_algorithms import ALONE, models_for

EACH, PROMPTS = 4, 6
# chosen sequences on two replicas of two stages; on three replicas that communicate in every pass
PLANS: Mapping[str, tuple[int, Mapping[str, tuple[str, str]]]] = {
    "stages": (4, {"*": ("node0", "d2t1p2m2"), "actor_gen": ("node0:gpu[0-1]", "d1t2p1")}),
    "replicas": (3, {"*": ("node0", "d3t1p1m2"), "actor_train": ("node0", "d3t1p1m3z2")}),
}
CASES: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any], tuple[str, ...]]] = {
    "raft": (("actor",), {"keep": 2, "mini_batches": 2}, ("stages",)),
    "iterative_dpo": (("actor", "ref"), {"mini_batches": 2}, ("stages",)),
    "grpo": (("actor", "ref"), {"dynamic_sampling": 3, "mini_batches": 2, "scale": "batch"}, tuple(PLANS)),
    "rloo": (("actor",), {"dynamic_sampling": 5, "kl_coef": 0, "whiten_advantages": True}, ("replicas",)),
}


def coarse(samples: Sequence[Sample]) -> list[float]:
    """0 or 1, so that all samples of some prompts have one score."""
    return [float(len(sample.response.split()) % 3 == 0) for sample in samples]


def chosen(algorithm: str, scores: Mapping[int, float]) -> list[int]:
    """Positions that an iteration learns from, one prompt after the other."""
    hyperparameters = CASES[algorithm][1]
    groups = [range(EACH * prompt, EACH * (prompt + 1)) for prompt in range(PROMPTS)]
    found: list[int] = []
    for group in groups:
        ranked = sorted(group, key=lambda p: (-scores[p], p))
        if algorithm == "raft":
            found += ranked[: hyperparameters["keep"]]
        elif algorithm == "iterative_dpo":
            found += [ranked[0], ranked[-1]]
    if "dynamic_sampling" in hyperparameters:
        order = sorted(groups, key=lambda group: len({scores[p] for p in group}) == 1)
        found = [p for group in order[: hyperparameters["dynamic_sampling"]] for p in group]
    return sorted(found)


@pytest.mark.parametrize("algorithm", CASES)
def test_any_plan_trains_on_what_is_chosen_by_hand(tmp_path: Path, algorithm: str) -> None:
    roles, hyperparameters, plans = CASES[algorithm]
    models = models_for(tmp_path, algorithm)
    experiment = ppo_content(tmp_path, {role: models[role] for role in roles}, algorithm=algorithm)
    experiment["workload"] |= {"sequences": EACH * PROMPTS, "samples_per_prompt": EACH}
    experiment |= {"hyperparameters": dict(hyperparameters), "reward": "tests.ranks.test_selection:coarse"}
    plan = make_plan(tmp_path, experiment, 1, ALONE)
    expected = run(plan, tmp_path / "alone")
    signals = []
    for metrics, tokens, scores in zip(expected.metrics, expected.tokens, expected.scores, strict=True):
        positions = chosen(algorithm, scores)
        assert len(positions) == plan.graph.by_name["actor_train"].num_sequences(EACH * PROMPTS)
        trained = sum(len(tokens[p]) for p in positions)
        assert metrics["actor_train/tokens"] == trained < metrics["actor_gen/tokens"]
        if algorithm == "iterative_dpo":
            assert metrics["ref_inf/tokens"] == trained
        if "dynamic_sampling" in hyperparameters:
            without = [len({scores[EACH * k + i] for i in range(EACH)}) == 1 for k in range(PROMPTS)]
            signals.append(PROMPTS - sum(without))
            missing = max(0, hyperparameters["dynamic_sampling"] - signals[-1])
            assert metrics["actor_train/without_signal"] == sum(without)
            assert metrics["actor_train/missing"] == missing
    assert all(0 < signal < PROMPTS for signal in signals), "or else nothing would be chosen"
    for name in plans:
        gpus, placements = PLANS[name]
        assert_same(run(make_plan(tmp_path, experiment, gpus, placements), tmp_path / name), expected)
