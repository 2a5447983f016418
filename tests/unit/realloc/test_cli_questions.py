"""The commands that answer questions about plans: what they print and write, and how they end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from realloc.cli import main
from realloc.plan import read_plan
from tests.unit.realloc.make import experiment_mapping, plan_mapping, write
from tests.unit.realloc.test_cli import failure


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A small model on two GPUs: planning takes no time."""
    content = experiment_mapping() | {"cluster": {"nodes": 1, "gpus_per_node": 2, "device": "h100-sxm"}}
    shape = {
        "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 2048, "vocab_size": 32000,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    content["models"] = dict.fromkeys(("actor", "critic", "ref", "reward"), "./model")
    return write(tmp_path / "experiment.yaml", content)


@pytest.fixture
def plan(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "plan.yaml"
    assert main(["search", str(experiment), "-o", str(path), "--method", "greedy"]) == 0
    assert f"Why it is so: realloc explain {path}" in capsys.readouterr().out
    return path


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_explain(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "explain", plan, "--time-limit", 1)
    assert "actor_gen: " in text
    assert "Next best: " in text
    content = json.loads(output(capsys, "explain", plan, "--json", "--time-limit", 1))
    assert content["iteration_s"] == pytest.approx(read_plan(plan).predictions.iteration_s, rel=1e-4)  # type: ignore[union-attr]


def test_compare(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "compare", experiment, "--time-limit", 1)
    assert "megatron" in text
    content = json.loads(output(capsys, "compare", experiment, "--json", "--time-limit", 1))
    searched, *others = content["plans"]
    assert searched["name"] == "searched"
    assert all(
        other["iteration_s"] >= searched["iteration_s"] * (1 - 1e-9) for other in others if other["fits"]
    )


def test_fit(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "fit.svg"
    text = output(capsys, "fit", experiment, "--max-gpus", 2, "--time-limit", 1, "--plot", plot)
    assert "It fits from 1 GPU on" in text
    assert plot.read_text().startswith("<svg")
    content = json.loads(output(capsys, "fit", experiment, "--max-gpus", 2, "--time-limit", 1, "--json"))
    assert [point["gpus"] for point in content["points"]] == [1, 2]
    assert "would overwrite" in failure(capsys, "fit", experiment, "--plot", experiment)


def test_report(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    text = output(capsys, "report", plan, "-o", page, "--time-limit", 1)
    assert f"Wrote {page}" in text
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "no such file" in failure(capsys, "report", plan, "-o", page, "--run", tmp_path / "nothing")
    assert "is a directory" in failure(capsys, "report", plan, "-o", tmp_path)


def test_contradictory_constraints_and_plans_against_them(
    tmp_path: Path, experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    content: dict[str, Any] = yaml.safe_load(experiment.read_text())
    content["constraints"] = {"all": {"tp": 1}, "calls": {"actor_gen": {"tp": {"min": 2}}}}
    path = write(tmp_path / "contradiction.yaml", content)
    message = failure(capsys, "search", path)
    assert "all.tp 1 and calls.actor_gen.tp {min: 2} contradict each other" in message
    content = plan_mapping()
    content["experiment"]["constraints"] = {"reserve": ["node1"]}
    message = failure(capsys, "explain", write(tmp_path / "plan.yaml", content))
    assert "against the experiment's constraint reserve node[1]" in message


def test_an_interrupted_search_leaves_the_best_plan_so_far(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner.problem import Problem

    path = tmp_path / "plan.yaml"
    evaluate, calls = Problem.evaluate, []

    def interrupted(self: Problem, *arguments: Any, **options: Any) -> float:
        calls.append(1)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(Problem, "evaluate", interrupted)
    assert main(["search", str(experiment), "-o", str(path)]) == 130
    captured = capsys.readouterr()
    assert "realloc: interrupted after" in captured.err
    assert "the best plan so far" in captured.err
    assert f"Wrote {path}" in captured.out
    read_plan(path).check()
