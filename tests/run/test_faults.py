"""Ranks that die and stop under a run: they are named, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.run.test_resume import metrics_of, names, wait_for_checkpoint, weights_of
from tests.run.workplace import Workplace

ITERATIONS = 6


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


def test_a_killed_and_a_stopped_rank_change_nothing(workplace: Workplace) -> None:
    """One after the other, in the same run; then bit for bit the undisturbed run."""
    workplace.plan("calm", iterations=ITERATIONS)
    code, _, err = workplace.run("run", "calm.yaml", "--out", "calm", "--save-every", "1")
    assert code == 0, err
    calm, out = workplace.folder / "calm", workplace.folder / "hit"
    process = workplace.start("run", "calm.yaml", "--out", "hit", "--save-every", "1", "--detect-within", "5")
    for after, rank, number in ((2, 1, signal.SIGKILL), (4, 0, signal.SIGSTOP)):
        wait_for_checkpoint(process, out, after)
        launcher = psutil.Process(process.pid)
        victims = sorted(launcher.children(), key=lambda child: child.pid)
        os.kill(victims[rank].pid, number)
        hit_s = time.monotonic()
        while len(restarts(out)) < (1 if number is signal.SIGKILL else 2):
            assert time.monotonic() < hit_s + 30, "nobody has noticed"
            time.sleep(0.01)
        _, alive = psutil.wait_procs(victims, timeout=5)
        assert not alive
    printed, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    killed, stopped = restarts(out)
    assert (killed["kind"], killed["rank"], killed["host"]) == ("killed", 1, os.uname().nodename)
    assert (stopped["kind"], stopped["rank"]) == ("stopped", 0)
    assert killed["from_iteration"] >= 2
    assert f"rank 1 on {os.uname().nodename} (iteration " in err
    assert f"restart 2 of 3, from iteration-{stopped['from_iteration']}" in err
    assert "Traceback" not in err
    assert metrics_of(out) == metrics_of(calm)
    assert names(out) == names(calm)
    assert f"iteration {ITERATIONS}/{ITERATIONS}" in printed
    assert_same_models(out, calm)
    # as if it had been killed after its last iteration: what is left to do is done
    (out / "trace.jsonl").unlink()
    shutil.rmtree(out / "models")
    code, _, err = workplace.run("run", "--resume", "hit")
    assert code == 0, err
    assert_same_models(out, calm)
    assert metrics_of(out) == metrics_of(calm)


def assert_same_models(out: Path, calm: Path) -> None:
    for role in ("actor", "critic"):
        got, want = weights_of(out / "models" / role), weights_of(calm / "models" / role)
        assert all(np.array_equal(got[name], want[name]) for name in want)


def restarts(out: Path) -> list[dict[str, Any]]:
    record = out / "restarts.jsonl"
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
