"""Processes that do the same beside a measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from realloc.errors import RunError
from runtime.neighbours import Neighbours


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
    pids = {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    made.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_that_dies_is_told() -> None:
    def work(number: int, _: Callable[[], bool]) -> None:
        if number:
            os._exit(1)

    made = Neighbours(1, work)
    with pytest.raises(RunError, match="has died"), made.at(1):
        pass
