"""The batch script, and what is said where Slurm is not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from realloc.errors import InputError
from runtime.slurm import SlurmJob, batch_script, run_by_slurm


def job(**changes: object) -> SlurmJob:
    values: dict[str, object] = {
        "name": "ppo",
        "arguments": ("run", "my plan's.yaml", "--out", "out/ppo"),
        "num_nodes": 2,
        "gpus_per_node": 8,
        "uses_gpus": True,
        "log": Path("/work place/ppo.slurm-%j.log"),
    }
    return SlurmJob(**(values | changes))  # type: ignore[arg-type]


def test_the_script_asks_for_the_plans_nodes_and_gpus() -> None:
    lines = batch_script(job(options=("--partition=a",))).splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=a"} <= set(lines)
    assert "#SBATCH '--output=/work place/ppo.slurm-%j.log'" in lines
    assert "#SBATCH --cpus-per-task=8" in batch_script(job(uses_gpus=False))
    assert "rdzv" not in batch_script(job(num_nodes=1))


def test_every_node_types_the_same_command_with_its_own_number(tmp_path: Path) -> None:
    """The script runs, with programs of Slurm that stand in: two nodes, and what each is told."""
    stand_ins = {
        "scontrol": 'case "$2" in hostnames) echo a; echo b;; node) echo "A=x NodeAddr=10.0.0.7 B=y";; esac',
        "srun": 'shift 4; for i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "python": 'printf "%s|" "$@"; echo',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = batch_script(job(python="python"))
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "a,b",
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    start = "-m|realloc|run|my plan's.yaml|--out|out/ppo|--nnodes|2|--node-rank|"
    assert done.stdout.splitlines() == [f"{start}{node}|--rdzv-endpoint|10.0.0.7:20017|" for node in (0, 1)]


def test_without_slurm_the_message_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="sbatch is not on the PATH"):
        run_by_slurm(job(), tmp_path / "job.sbatch")


def test_a_small_allocation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(InputError, match=r"needs 2 nodes, allocation 17 has 1"):
        run_by_slurm(job(), tmp_path / "job.sbatch")
