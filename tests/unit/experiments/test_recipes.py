"""The recipes that run on the demo's model and data: one for each algorithm, and its published variants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import experiments
from experiments import sums
from experiments.verifiers import arithmetic
from planner.api import search_plan
from realloc.algorithm import BUILT_IN
from realloc.experiment import read_experiment
from realloc.functions import Sample
from realloc.plan import plan_text

FOLDER = Path(experiments.__file__).parent / "recipes"
ELSEWHERE = ("ppo_llama7b_16xh100", "ppo_llama70b_128xh100", "ppo_stories260k", "reward_hh_smollm2", "sums")
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in ELSEWHERE)


def test_every_algorithm_has_a_recipe_of_its_name() -> None:
    assert set(BUILT_IN) <= set(RECIPES)
    for name in BUILT_IN:
        assert read_experiment(FOLDER / f"{name}.yaml").algorithm == name


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_plan_where_they_are(name: str) -> None:
    """Models and data are the demo's, so a recipe runs as it is."""
    experiment = read_experiment(FOLDER / f"{name}.yaml")
    assert experiment.data is not None
    assert experiment.cluster is not None
    assert all(model.has_weights for model in experiment.models.values())
    plan = search_plan(experiment, experiment.cluster, time_limit_s=1.0).plan
    plan.check()
    assert "predictions" in plan_text(plan)


def test_the_sums_are_written_with_their_recipe(tmp_path: Path) -> None:
    sums.write_task(tmp_path, seed=1)
    experiment = read_experiment(tmp_path / "experiment.yaml")
    assert [source.verifier for source in experiment.rewards] == ["arithmetic"]
    rows = [json.loads(line) for name in ("train", "test") for line in (tmp_path / f"{name}.jsonl").open()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 100
    right = [Sample(0, row["prompt"], str(row["answer"]), True, row) for row in rows]
    assert arithmetic(right) == [1.0] * 100
