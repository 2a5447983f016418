"""The recipes that run on the demo's model and data: one for each algorithm, and its published variants."""

from __future__ import annotations

from pathlib import Path

import pytest

import experiments
from planner.api import search_plan
from realloc.algorithm import BUILT_IN
from realloc.experiment import read_experiment
from realloc.plan import plan_text

FOLDER = Path(experiments.__file__).parent / "recipes"
ELSEWHERE = ("ppo_llama7b_16xh100", "ppo_llama70b_128xh100", "ppo_stories260k")
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
