"""Metrics that are no plain means, the loggers that a user asks for, and the samples that are kept."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from statistics import pstdev
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

import experiments
from planner.api import search_plan
from realloc.errors import InputError, RunError
from realloc.experiment import read_experiment
from realloc.plan import ExecutionPlan
from runtime.display import Lines, Moment
from runtime.metrics import Metrics, MetricsChannel, combine
from runtime.monitor import Monitor
from runtime.samples import put_together, shown_positions
from runtime.writers import check_loggers, open_writers


def test_largest_values_and_deviations_are_those_of_all_ranks() -> None:
    ranks = []
    for values in ([1.0, 5.0], [], [2.0, 2.0, 8.0]):
        metrics = Metrics()
        for value in values:
            metrics.add("x", value, 1)
            metrics.add("x_square", value * value, 1)
            metrics.add("x_max", value, 1)
        ranks.append(metrics.sums)
    found = combine(ranks)
    everything = [1.0, 5.0, 2.0, 2.0, 8.0]
    assert found == pytest.approx({"x": 3.6, "x_max": 8.0, "x_std": pstdev(everything)})


def test_the_largest_of_several_micro_batches_counts_once() -> None:
    metrics = Metrics()
    for ratio in (1.5, 3.0, 2.0):
        metrics.add_contribution("ratio_max", ratio, 2)
        metrics.add_contribution("loss", 0.25, 2)
    metrics.end_step()
    assert combine([metrics.sums, metrics.sums]) == {"ratio_max": 3.0, "loss": 1.5}


class Calls(ModuleType):
    """A module that remembers what was called of it; `init` gives itself as the run."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            return self

        return call


def test_loggers_get_the_experiment_and_every_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = Calls("wandb"), Calls("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    out, settings = tmp_path / "run-7", {"algorithm": "ppo", "sampling": {"temperature": 1.0}}
    writers = open_writers(("wandb", "mlflow"), out, settings, 0)
    for writer in writers:
        writer.write(4, {"actor_train/loss": 0.5})
        writer.close()
    assert wandb.calls == [
        ("init", (), {"name": "run-7", "dir": str(out), "config": settings}),
        ("log", ({"actor_train/loss": 0.5},), {"step": 4}),
        ("finish", (), {}),
    ]
    assert mlflow.calls == [
        ("start_run", (), {"run_name": "run-7"}),
        ("log_params", ({"algorithm": "ppo", "sampling.temperature": 1.0},), {}),
        ("log_metrics", ({"actor_train/loss": 0.5},), {"step": 4}),
        ("end_run", (), {}),
    ]


def test_a_logger_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--log wandb: the package is not installed; pip install wandb"):
        check_loggers(("wandb",))


def test_what_ranks_know_of_a_sample_is_put_together() -> None:
    text = {"0": {"id": 24, "prompt": "a", "response": "b"}, "6": {"id": 30, "prompt": "c", "response": "d"}}
    scores: dict[str, dict[str, Any]] = {"6": {"id": 30, "scores": 0.5}, "11": {"id": 35, "scores": 1.0}}
    assert put_together(2, [text, {}, scores, text]) == [
        {"iteration": 2, "id": 24, "prompt": "a", "response": "b"},
        {"iteration": 2, "id": 30, "prompt": "c", "response": "d", "scores": 0.5},
    ]


def test_other_sequences_are_shown_in_other_iterations() -> None:
    assert [shown_positions(i, 12, 3) for i in range(2)] == [[0, 4, 8], [1, 5, 9]]
    assert {p for i in range(12) for p in shown_positions(i, 12, 1)} == set(range(12))
    assert shown_positions(5, 3, 10) == [2, 0, 1]
    assert shown_positions(5, 3, 0) == []


def test_a_logger_that_fails_gets_no_more_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Down(Calls):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.calls.append(("log_metrics", (), {}))
            raise ConnectionError("no server\nand more")

    down = Down("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", down)
    warned: list[str] = []
    *_, writer = open_writers(("mlflow",), tmp_path, {}, 0, warned.append)
    for iteration in range(3):
        writer.write(iteration, {"loss": 0.5})
    writer.close()
    assert warned == ["mlflow fails and gets no more metrics (no server); metrics.jsonl has all"]
    assert [name for name, _, _ in down.calls] == ["start_run", "log_params", "log_metrics"]


def test_a_logger_that_cannot_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(ModuleType):
        def init(self, **_: Any) -> None:
            raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", Closed("wandb"))
    with pytest.raises(InputError, match="--log wandb: cannot be opened: api_key not configured"):
        open_writers(("wandb",), tmp_path, {}, 0)


def test_tensorboard_reads_what_a_restart_has_written_anew(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((0, 1.0), (2, 5.0)):
        (writer,) = open_writers((), tmp_path, {}, first)
        for iteration in range(first, 4):
            writer.write(iteration, {"actor_train/loss": value + iteration})
        writer.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("actor_train/loss")
    assert [(event.step, event.value) for event in found] == [(0, 1.0), (1, 2.0), (2, 7.0), (3, 8.0)]


@pytest.fixture(scope="module")
def plan() -> ExecutionPlan:
    experiment = read_experiment(Path(experiments.__file__).parent / "recipes" / "ppo.yaml")
    assert experiment.cluster is not None
    found = search_plan(experiment, experiment.cluster, time_limit_s=0.5).plan
    return replace(found, experiment=replace(experiment, iterations=2))


def reported(iterations: int) -> MetricsChannel:
    channel = MetricsChannel(dist.HashStore(), (0,))
    for iteration in range(iterations):
        channel.report(iteration, 0, {"actor_gen/tokens": (5.0, 1.0)})
    return channel


class Broken:
    """A place for metrics that fails."""

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        raise ValueError("no such place")

    def close(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_place_that_fails_is_told_at_the_end(
    plan: ExecutionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.monitor.open_writers", lambda *_: (Broken(),))
    message = r"metrics\.jsonl: lacks the metrics of some iterations"
    with Monitor(plan, reported(1), tmp_path) as monitor:
        monitor.begin()
        with pytest.raises(RunError, match=message):
            monitor.finish()


@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1)])  # the second is how rich says it
def test_a_run_goes_on_when_nobody_looks_any_more(
    plan: ExecutionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    class Gone(Lines):
        def show(self, moment: Moment) -> None:
            raise error

    monkeypatch.setattr("runtime.monitor.open_display", lambda *_: Gone(Console()))
    with Monitor(plan, reported(2), tmp_path) as monitor:
        monitor.begin()
        monitor.finish()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_nothing_runs_beside_the_launcher_before_it_begins(plan: ExecutionPlan, tmp_path: Path) -> None:
    threads = threading.active_count()
    with Monitor(plan, reported(1), tmp_path) as monitor:
        assert threading.active_count() == threads
        monitor.begin()
        monitor.finish()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
