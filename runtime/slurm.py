"""Starting a run through Slurm: the batch script that starts `realloc run` once on every node.

Decides the script and whether to submit it or, inside an allocation, to run it there. It refuses to
know anything about ranks: on each node the same launcher runs as without Slurm, told its number by
SLURM_NODEID and the meeting point by the first node's address.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from realloc.errors import InputError, RunError
from realloc.files import write_text

FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Node 0 listens on a port derived from the job's number, so that two jobs on a host do not meet."""


@dataclass(frozen=True)
class SlurmJob:
    """`arguments`: what follows `realloc` on every node, without the options that tell it its place.

    `options` are the user's own for sbatch (`--partition=a`, `--time=4:00:00`), and win over ours. `python`
    must be at the same place on every node.
    """

    name: str
    arguments: tuple[str, ...]
    num_nodes: int
    gpus_per_node: int
    uses_gpus: bool
    log: Path
    options: tuple[str, ...] = ()
    python: str = sys.executable


def batch_script(job: SlurmJob) -> str:
    """The script for sbatch. It needs nothing but Slurm, bash and this Python on every node."""
    resource = "gpus-per-node" if job.uses_gpus else "cpus-per-task"
    header = [
        f"--job-name={job.name}",
        f"--nodes={job.num_nodes}",
        "--ntasks-per-node=1",
        f"--{resource}={job.gpus_per_node}",
        f"--output={job.log}",
        *job.options,
    ]
    asked = [f"#SBATCH {shlex.quote(option)}" for option in header]  # sbatch reads quotes as a shell does
    lines = ["#!/bin/bash", *asked, "set -euo pipefail", *_body(job)]
    return "\n".join(lines) + "\n"


def _body(job: SlurmJob) -> list[str]:
    """Bash that finds the meeting point and starts one launcher a node, all ended with the first to fail."""
    command = shlex.join([job.python, "-m", "realloc", *job.arguments])
    step = f"srun --nodes={job.num_nodes} --ntasks={job.num_nodes} --ntasks-per-node=1 --kill-on-bad-exit=1"
    if job.num_nodes == 1:
        return [f"{step} {command}"]
    place = f'--nnodes {job.num_nodes} --node-rank "$SLURM_NODEID" --rdzv-endpoint "$0"'
    return [
        # sed reads to the end: with head, scontrol may end by SIGPIPE, and pipefail the script by that
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        "# the address under which Slurm itself reaches the node",
        "address=$(scontrol show node \"$first\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        f"port=$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))",
        f'{step} bash -c {shlex.quote(f"exec {command} {place}")} "$address:$port"',
    ]


def run_by_slurm(job: SlurmJob, script_path: Path) -> None:
    """Submits the job and says its number; inside an allocation runs it there and waits.

    Raises InputError where Slurm is missing, refuses the job, or the allocation is too small, and
    RunError when a run inside an allocation fails.
    """
    for program in ("sbatch", "srun", "scontrol"):
        if shutil.which(program) is None:
            raise InputError(
                f"--launcher slurm: {program} is not on the PATH; run this on a Slurm login node."
            )
    if "SLURM_JOB_ID" in os.environ:
        _attach(job)
        return
    write_text(script_path, batch_script(job))
    done = subprocess.run(
        ["sbatch", "--parsable", str(script_path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(
            f"--launcher slurm: sbatch refuses {script_path}: {done.stderr.strip()}. Give what this cluster "
            f"asks for as --slurm-options, such as '--partition=P --time=4:00:00'."
        )
    number = done.stdout.strip().split(";")[0]
    print(f"submitted job {number}: {job.num_nodes} nodes x {job.gpus_per_node}, script {script_path}")
    print(f"follow it: tail -F {str(job.log).replace('%j', number)}   end it: scancel {number}")


def _attach(job: SlurmJob) -> None:
    """Runs the job's body inside the allocation that this process is part of."""
    given = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if given < job.num_nodes:
        raise InputError(
            f"--launcher slurm: the plan needs {job.num_nodes} nodes, allocation "
            f"{os.environ['SLURM_JOB_ID']} has {given}; allocate more, or plan for {given}."
        )
    environment = dict(os.environ)
    if re.fullmatch(r"\d+", environment.get("SLURM_STEP_ID", "")):
        environment["SLURM_OVERLAP"] = "1"  # inside a step, whose resources the new step has to share
    print(f"inside allocation {os.environ['SLURM_JOB_ID']}: running on {job.num_nodes} of its {given} nodes")
    sys.stdout.flush()
    script = "\n".join(["set -euo pipefail", *_body(job)])
    code = subprocess.run(["bash", "-c", script], env=environment, check=False).returncode
    if code:
        raise RunError(f"the run inside allocation {os.environ['SLURM_JOB_ID']} ended with exit code {code}.")
