"""Planning a real experiment with the real cost model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.api import search_plan
from realloc.cluster import Cluster
from realloc.errors import InfeasibleError, InputError
from realloc.experiment import Experiment, parse_experiment
from realloc.files import Reader
from realloc.plan import read_plan, write_plan

H100 = Cluster(2, 8, "h100-sxm")


def ppo(**changes: Any) -> Experiment:
    content = {
        "algorithm": "ppo",
        "dtype": "bfloat16",
        "models": dict.fromkeys(("actor", "ref", "critic", "reward"), "llama-7b"),
        "workload": {"sequences": 128, "prompt_tokens": 256, "response_tokens": 256},
        **changes,
    }
    return parse_experiment(Reader(content, "experiment"), Path())


def test_a_searched_plan_is_legal_predicts_itself_and_survives_its_file(tmp_path):
    experiment = ppo()
    result = search_plan(experiment, H100, seed=1)
    plan = result.plan
    plan.check("test")
    predictions = plan.predictions
    assert predictions is not None
    assert set(predictions.node_s) == {node.name for node in plan.augmented.nodes}
    assert predictions.iteration_s == pytest.approx(result.iteration_s)
    assert predictions.tokens_per_s == pytest.approx(128 * 512 / result.iteration_s)
    assert predictions.lower_bound_s is not None
    assert 0 < predictions.lower_bound_s <= predictions.iteration_s
    assert sum(predictions.peak_bytes.values()) <= result.capacity_bytes
    assert "h100" in predictions.costs
    write_plan(plan, tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "plan.yaml")
    assert again.placements == plan.placements
    assert again.order == plan.order


def test_planning_imports_no_torch():
    program = (
        "import sys\n"
        "from tests.unit.planner.test_api import ppo, H100\n"
        "from planner.api import search_plan\n"
        "from planner.report import report_text\n"
        "report_text(search_plan(ppo(), H100, method='greedy'))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_too_small_a_cluster_is_refused_with_numbers():
    models = dict.fromkeys(("actor", "ref", "critic", "reward"), "llama-70b")
    with pytest.raises(InfeasibleError) as caught:
        search_plan(ppo(models=models), Cluster(1, 2, "h100-sxm"))
    message = str(caught.value)
    assert "fits nowhere" in message
    assert "GiB" in message
    assert "+full needs" in message
    assert "use 8 times the GPUs (with d" in message


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match="Did you mean 'greedy'"):
        search_plan(ppo(), H100, method="gredy")
