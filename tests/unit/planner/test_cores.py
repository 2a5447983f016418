"""Work on all cores ends as one process would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from planner.cores import on_all_cores
from planner.keeping import Limits
from realloc.cluster import Cluster
from realloc.errors import InputError
from tests.unit.planner.problems import make_problem, ppo_graph

ROOT = Path(__file__).resolve().parents[3]


def test_two_processes_find_what_one_does(monkeypatch):
    found = []
    for cores in ({0}, {0, 1}, {0, 1, 2}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        problem = make_problem(ppo_graph(), Cluster(2, 8, "x"), 3, bytes_scale=300.0, limits=Limits())
        found.append(problem.candidate_set)
        assert on_all_cores([partial(pow, 2, k) for k in range(7)]) == [2**k for k in range(7)]
    assert found[0] == found[1] == found[2]


def test_what_goes_wrong_in_another_process_is_told_here(monkeypatch):
    def piece(number):
        if number == 1:
            raise InputError("the second piece is wrong")
        return number

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(InputError, match="the second piece is wrong"):
        on_all_cores([partial(piece, k) for k in range(4)])


def test_an_interrupt_ends_other_processes_quietly(tmp_path):
    """Ctrl-C reaches every process of the terminal: while candidates are priced, only one may speak."""
    script = tmp_path / "pieces.py"
    script.write_text(
        "import sys, time\nfrom planner.cores import on_all_cores\n"
        "def piece():\n    print('begun', flush=True)\n    time.sleep(60)\n"
        "try:\n    on_all_cores([piece, piece])\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(min(2, len(os.sched_getaffinity(0)))):
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
