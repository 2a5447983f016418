"""`realloc run --launcher slurm|ray`: the same command, started on every node by a cluster's own means.

Decides which of the user's arguments go to the nodes and which are for the launcher alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.errors import InputError, ReallocError

if TYPE_CHECKING:
    from realloc.plan import ExecutionPlan

LOCAL, SLURM, RAY = "local", "slurm", "ray"


def launcher_options() -> argparse.ArgumentParser:
    """The options that stay with the launcher; a parent of the parser of `run`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("clusters")
    group.add_argument(
        "--launcher",
        choices=(LOCAL, SLURM, RAY),
        default=LOCAL,
        help="start the nodes here (local), by Slurm (inside an allocation: in it), or on a Ray cluster",
    )
    group.add_argument("--dry-run", action="store_true", help="show what --launcher would start, and stop")
    group.add_argument(
        "--slurm-options",
        metavar="TEXT",
        default="",
        help="more options for sbatch, such as '--partition=a --time=4:00:00'",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="HOST:PORT of the Ray cluster, or 'auto' on one of its nodes (default: a local Ray of one node)",
    )
    return parser


def launch(arguments: argparse.Namespace, given: Sequence[str], plan_path: Path, out: Path) -> int:
    """Starts the run that `given` (all arguments after `realloc`) describes; returns the exit code.

    Raises InputError for a plan that cannot be read, and what the launchers raise.
    """
    from realloc.plan import read_plan  # here, so that help comes at once

    plan = read_plan(plan_path, trust=arguments.trust)
    _, for_nodes = launcher_options().parse_known_args(given)
    if arguments.resume is None and arguments.out is None:
        for_nodes += ["--out", str(out)]
    if arguments.launcher == SLURM:
        return _by_slurm(arguments, tuple(for_nodes), plan, out)
    return _by_ray(arguments, tuple(for_nodes), plan)


def _by_slurm(
    arguments: argparse.Namespace, for_nodes: tuple[str, ...], plan: ExecutionPlan, out: Path
) -> int:
    from runtime.slurm import SlurmJob, batch_script, run_by_slurm

    beside = out.absolute()
    job = SlurmJob(
        name=out.name,
        arguments=for_nodes,
        num_nodes=plan.cluster.num_nodes,
        gpus_per_node=plan.cluster.gpus_per_node,
        uses_gpus=_uses_gpus(plan),
        log=beside.with_name(f"{beside.name}.slurm-%j.log"),
        options=tuple(shlex.split(arguments.slurm_options)),
    )
    if arguments.dry_run:
        print(batch_script(job), end="")
    else:
        run_by_slurm(job, beside.with_name(f"{beside.name}.sbatch"))
    return 0


def _by_ray(arguments: argparse.Namespace, for_nodes: tuple[str, ...], plan: ExecutionPlan) -> int:
    from runtime.ray_cluster import RayJob, run_by_ray

    job = RayJob(
        arguments=for_nodes,
        num_nodes=plan.cluster.num_nodes,
        gpus_per_node=plan.cluster.gpus_per_node,
        uses_gpus=_uses_gpus(plan),
        folder=str(Path.cwd()),
        address=arguments.ray_address,
    )
    if not arguments.dry_run:
        return run_by_ray(job)
    print(f"placement group (STRICT_SPREAD): {job.num_nodes} bundles of {job.bundle}")
    print(f"in each, from {job.folder}: {shlex.join([sys.executable, '-m', 'realloc', *job.arguments])}")
    if job.num_nodes > 1:
        print(f"  --nnodes {job.num_nodes} --node-rank BUNDLE --rdzv-endpoint HOST-OF-BUNDLE-0:PORT")
    return 0


def _uses_gpus(plan: ExecutionPlan) -> bool:
    """Whether the plan's device is a GPU; this host, a login node perhaps, says nothing about it."""
    from cost_models.profile import load_profile

    try:
        return not load_profile(plan.cluster.device).attention.per_sequence
    except ReallocError:
        return True  # a measured profile that is not on this host; ranks without GPUs are the exception


def check_launcher(arguments: argparse.Namespace) -> None:
    """Raises InputError for launcher options without their launcher."""
    chosen = arguments.launcher
    for option, wanted in (("slurm_options", SLURM), ("ray_address", RAY)):
        if getattr(arguments, option) and chosen != wanted:
            raise InputError(f"--{option.replace('_', '-')} is for --launcher {wanted}.")
    if arguments.dry_run and chosen == LOCAL:
        raise InputError(
            "--dry-run shows what --launcher slurm or ray would start; `realloc check` checks a plan."
        )
