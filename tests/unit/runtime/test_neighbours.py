"""Processes that do the same beside a measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from realloc.errors import RunError
from realloc.files import dump_yaml
from runtime.microbenchmarks import turns
from runtime.neighbours import Neighbours
from runtime.shared_cores import shared_cores
from tests.ranks.engine import ppo_content, write_models


def test_they_work_while_the_block_runs_and_only_then(tmp_path: Path) -> None:
    def work(number: int, stopped: Callable[[], bool]) -> None:
        while True:
            with (tmp_path / f"{number}-{os.getpid()}").open("a") as file:
                file.write("x")
            if stopped():
                return

    made = Neighbours(2, work)
    for number in (3, 7):
        with made.at(number):
            at_it = {path: path.stat().st_size for path in tmp_path.glob(f"{number}-*")}
            assert len(at_it) == 2  # both had begun before the block did
            time.sleep(0.05)
            assert all(path.stat().st_size > size for path, size in at_it.items())
        idle = {path: path.stat().st_size for path in tmp_path.glob(f"{number}-*")}
        time.sleep(0.05)
        assert {path: path.stat().st_size for path in idle} == idle
    with made.at(9, 1):
        assert len(list(tmp_path.glob("9-*"))) == 1  # the other one stays idle
    pids = {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    made.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ranks_at_once_are_measured_with_an_experiment_of_theirs(tmp_path: Path) -> None:
    models = write_models(tmp_path, hidden=16, layers=1, heads=2, kv_heads=1, ffn=16)
    workload = {"sequences": 4, "prompt_tokens": 4, "response_tokens": 4}
    content = ppo_content(tmp_path, models, workload=workload, hyperparameters={"mini_batches": 1})
    path = tmp_path / "experiment.yaml"
    path.write_text(dump_yaml("experiment", content), encoding="utf-8")
    found = shared_cores([str(path)], 3, 0.2)
    assert found is not None
    assert [ranks for ranks, _ in found.points] == [1, 2, 3]
    assert found.points[0][1] == 1.0
    assert all(slowdown >= turns(int(ranks)) / 3 for ranks, slowdown in found.points)
    assert not psutil.Process().children()  # nobody is left


def test_one_that_dies_is_told() -> None:
    def work(number: int, _: Callable[[], bool]) -> None:
        if number:
            os._exit(1)

    made = Neighbours(1, work)
    with pytest.raises(RunError, match="has died"), made.at(1):
        pass
