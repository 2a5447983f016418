"""Runs that stop and go on, as a user types it: kills, full disks, damage, other plans, exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from realloc.cli import main
from realloc.trace import read_trace
from runtime.checkpoint_files import checkpoints_folder, list_checkpoints, verify
from tests.run.workplace import Workplace

ITERATIONS = 8
CLOCK = ("seconds", "tokens_per_s")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def calm(workplace: Workplace) -> Path:
    """A run of eight iterations that nothing disturbs; it keeps checkpoints after 6 and 8."""
    plan = workplace.plan("calm", iterations=ITERATIONS)
    code, out, err = workplace.run("run", plan.name, "--out", "calm", "--save-every", "3")
    assert code == 0, err + out
    return workplace.folder / "calm"


def metrics_of(out: Path) -> list[Mapping[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def weights_of(model: Path) -> Mapping[str, Any]:
    return load_file(model / "model.safetensors")


def names(out: Path) -> list[str]:
    return [path.name for path in list_checkpoints(checkpoints_folder(out))]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_the_last_checkpoints_stay(calm: Path) -> None:
    assert names(calm) == ["iteration-6", "iteration-8"]
    assert [p.name for p in checkpoints_folder(calm).iterdir() if p.name.startswith(".")] == []


def test_killed_runs_go_on_as_if_nothing_had_happened(workplace: Workplace, calm: Path) -> None:
    """Kills at times that have nothing to do with what is being written; then bit for bit the calm run."""
    out = workplace.folder / "killed"
    command: Sequence[str] = ("run", "calm.yaml", "--out", "killed", "--save-every", "1")
    for kill, (after, delay_s) in enumerate(((1, 0.013), (4, 0.171))):
        process = workplace.start(*command)
        wait_for_checkpoint(process, out, after)
        time.sleep(delay_s)
        ranks = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive, f"kill {kill}: ranks outlive their launcher"
        for checkpoint in list_checkpoints(checkpoints_folder(out)):
            verify(checkpoint)
        command = ("run", "--resume", "killed", "--save-every", "1")
    code, printed, err = workplace.run(*command)
    assert code == 0, err
    assert "continuing after" in printed
    assert metrics_of(out) == metrics_of(calm)
    assert (out / "samples.jsonl").read_text() == (calm / "samples.jsonl").read_text()
    for role in ("actor", "critic"):
        got, want = weights_of(out / "models" / role), weights_of(calm / "models" / role)
        assert all(np.array_equal(got[name], want[name]) for name in want)
    assert names(out) == ["iteration-7", "iteration-8"]


def wait_for_checkpoint(process: subprocess.Popen[str], out: Path, iteration: int) -> None:
    deadline = time.monotonic() + 60
    while not any(int(name.partition("-")[2]) >= iteration for name in names(out)):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.005)


def test_damaged_checkpoint_then_another_plan_from_the_one_before(
    workplace: Workplace, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = workplace.folder / "damaged"
    shutil.copytree(calm, out)
    file = out / "checkpoints" / "iteration-8" / "rank-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    message = refused(capsys, "run", "--resume", out, "--iterations", 9)
    assert "iteration-8/rank-1.safetensors: is corrupted" in message
    assert "continue from it with --from iteration-6" in message
    assert metrics_of(out) == metrics_of(calm)
    assert (out / "samples.jsonl").read_text() == (calm / "samples.jsonl").read_text()
    workplace.plan("one", gpus=1, placements={"*": ("node0", "d1t1p1")}, iterations=ITERATIONS)
    code, printed, err = workplace.run(
        *("run", "--resume", "damaged", "--from", "iteration-6", "--plan", "one.yaml"),
        *("--iterations", "9", "--save-every", "3"),
    )
    assert code == 0, err
    assert "iteration 7/9" in printed
    assert "note: differs" not in printed
    assert names(out) == ["iteration-6", "iteration-9"]
    got, want = metrics_of(out), metrics_of(calm)
    assert [record["iteration"] for record in got] == list(range(9))
    assert got[:6] == want[:6]
    for mine, theirs in zip(got[6:8], want[6:], strict=True):
        assert mine["actor_train/loss"] == pytest.approx(theirs["actor_train/loss"], rel=1e-4, abs=1e-6)
        assert mine["actor_gen/response_tokens"] == theirs["actor_gen/response_tokens"]
    assert {r.iteration for r in read_trace(out / "trace.jsonl").records} == {6, 7, 8}
    assert {r.iteration for r in read_trace(out / "trace-before-6.jsonl").records} == set(range(8))


def test_what_cannot_go_on_is_refused(
    workplace: Workplace, calm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "8 of 8 iterations are done" in refused(capsys, "run", "--resume", calm)
    assert "no such folder" in refused(capsys, "run", "--resume", tmp_path / "nowhere")
    assert "has no checkpoint" in refused(capsys, "run", "--resume", tmp_path)
    assert "--resume goes on in the folder" in refused(capsys, "run", "--resume", calm, "--out", tmp_path)
    assert "give the run's folder as --resume" in refused(capsys, "run", "p.yaml", "--from", "iteration-6")
    assert "give a plan to run" in refused(capsys, "run")
    larger = Workplace(tmp_path / "larger", layers=3, ffn=64)
    plan = larger.plan("larger", iterations=20)
    message = refused(capsys, "run", "--resume", calm, "--plan", plan)
    assert "is of another actor model than" in message
    assert "num_layers 2 there and 3 here, ffn_dim 48 there and 64 here" in message
    narrow = workplace.plan("narrow", iterations=20, dtype="bfloat16")
    assert "has parameters in float32, the plan's dtype is bfloat16" in refused(
        capsys, "run", narrow, "--resume", calm
    )
    assert names(calm) == ["iteration-6", "iteration-8"]


def test_export_loads_in_transformers(calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "choose with --role" in refused(capsys, "export", calm, tmp_path / "model")
    assert "has no role 'ref'" in refused(capsys, "export", calm, tmp_path / "model", "--role", "ref")
    assert "there are: iteration-6, iteration-8" in refused(
        capsys, "export", calm, tmp_path / "model", "--role", "actor", "--iteration", 7
    )
    assert not (tmp_path / "model").exists()
    assert main(["export", str(calm), str(tmp_path / "last"), "--role", "actor"]) == 0
    assert main(["export", str(calm), str(tmp_path / "six"), "--role", "actor", "--iteration", "6"]) == 0
    assert "is not empty" in refused(capsys, "export", calm, tmp_path / "six", "--role", "actor")
    tokens = torch.arange(20)[None]
    logits = {}
    for folder in (tmp_path / "last", tmp_path / "six", calm / "models" / "actor"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits[folder.name] = model(tokens).logits
    assert torch.equal(logits["last"], logits["actor"])
    assert not torch.allclose(logits["six"], logits["last"], atol=1e-3)


def can_mount() -> bool:
    test = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return sys.platform == "linux" and subprocess.run(test, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk")
def test_full_disk_leaves_the_last_good_checkpoint(workplace: Workplace) -> None:
    """A disk of 2 MB, where a checkpoint takes about half of one: keeping all of them fills it."""
    workplace.plan("full", iterations=30)
    (workplace.folder / "disk").mkdir()
    run = f"{sys.executable} -m realloc run full.yaml --out disk/out --save-every 1 --keep 50 --trust"
    script = f"mount -t tmpfs -o size=2m tmpfs disk && {run}; code=$?; cp -r disk/out found; exit $code"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        cwd=workplace.folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stderr + done.stdout
    assert "cannot be written: No space left on device" in done.stderr
    assert "MB for its part" in done.stderr
    assert "the last good checkpoint is disk/out/checkpoints/iteration-" in done.stderr
    assert "realloc run --resume disk/out" in done.stderr
    assert "Traceback" not in done.stderr
    found = workplace.folder / "found"
    assert names(found)
    for checkpoint in list_checkpoints(checkpoints_folder(found)):
        verify(checkpoint)
    assert [p.name for p in checkpoints_folder(found).iterdir() if p.name.startswith(".")] == []
