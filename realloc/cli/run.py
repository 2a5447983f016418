"""`realloc run`: a plan is run, or a run resumed."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from realloc.cli.launchers import LOCAL, check_launcher, launch, launcher_options
from realloc.cli.nodes import add_nodes
from realloc.cli.values import Commands, add_trust, count, positive, seconds
from realloc.errors import InputError, ReallocError


def add(commands: Commands) -> None:
    run = commands.add_parser("run", help="run a plan", allow_abbrev=False, parents=[launcher_options()])
    run.add_argument(
        "plan",
        metavar="PLAN",
        type=Path,
        nargs="?",
        help="the plan's YAML file (with --resume: another plan to go on with)",
    )
    run.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where checkpoints, metrics and the trace go (default: out/ and the plan's name)",
    )
    run.add_argument(
        "--iterations", type=positive, metavar="N", help="run this many iterations instead of the plan's"
    )
    run.add_argument("--overwrite", action="store_true", help="delete an earlier run's output in the folder")
    run.add_argument(
        "--pin", action="store_true", help="keep every rank on a core of its own (hosts without GPUs)"
    )
    run.add_argument(
        "--log",
        dest="loggers",
        choices=("wandb", "mlflow"),
        action="append",
        default=[],
        help="send metrics to Weights & Biases or MLflow too, where installed (may be given twice)",
    )
    run.add_argument(
        "--log-format",
        choices=("auto", "text", "json"),
        default="auto",
        help="progress as a live view on a terminal and as lines elsewhere (auto), always as lines (text), "
        "or as JSON lines on standard output with all other words on standard error (json)",
    )
    run.add_argument(
        "--samples",
        type=count,
        default=2,
        metavar="N",
        help="keep N generated samples of every iteration in samples.jsonl (default: 2)",
    )
    _add_faults(run)
    _add_checkpoints(run)
    add_nodes(run).add_argument(
        "--join-timeout",
        type=seconds,
        default=120.0,
        metavar="S",
        help="how long the nodes wait for each other (default: 120 seconds)",
    )
    add_trust(run)
    run.set_defaults(command=_run)


def _add_faults(run: argparse.ArgumentParser) -> None:
    faults = run.add_argument_group("faults")
    faults.add_argument(
        "--max-restarts",
        type=count,
        default=3,
        metavar="N",
        help="when a rank dies, stops or hangs, go on from the last checkpoint up to N times (default: 3)",
    )
    faults.add_argument(
        "--detect-within",
        type=seconds,
        default=10.0,
        metavar="S",
        help="find a rank that died or was stopped in this time (default: 10 seconds)",
    )
    faults.add_argument(
        "--hang-factor",
        type=seconds,
        default=20.0,
        metavar="X",
        help="an instruction hangs when it takes X times what the plan predicts (default: 20) ...",
    )
    faults.add_argument(
        "--timeout",
        type=seconds,
        default=600.0,
        metavar="S",
        help="... and more than S seconds (default: 600)",
    )


def _add_checkpoints(run: argparse.ArgumentParser) -> None:
    saving = run.add_argument_group("checkpoints")
    saving.add_argument(
        "--save-every",
        type=count,
        metavar="N",
        help="write one every N iterations and after the last; 0: only after the last (default: after every "
        "iteration that does not end while one is still being written)",
    )
    saving.add_argument(
        "--keep", type=positive, default=2, metavar="K", help="keep the last K of them (default: 2)"
    )
    saving.add_argument(
        "--resume", metavar="DIR", type=Path, help="continue the run in this folder from its last checkpoint"
    )
    saving.add_argument(
        "--plan", dest="other_plan", metavar="PLAN", type=Path, help="with --resume: go on under this plan"
    )
    saving.add_argument(
        "--from",
        dest="checkpoint",
        metavar="NAME",
        help="with --resume: this checkpoint, such as iteration-20; later ones are deleted",
    )


def _run(arguments: argparse.Namespace) -> int:
    _check_run(arguments)
    check_launcher(arguments)
    if arguments.launcher != LOCAL:
        return _by_launcher(arguments)
    # a store whose host is gone prints C++ stacks otherwise; our own message names the host
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from runtime.host_memory import keep_freed_memory

    keep_freed_memory()  # before torch has threads
    from runtime.attempts import RunOptions
    from runtime.checkpoint import SaveOptions
    from runtime.launch import resume_run, run_plan
    from runtime.monitor import Watching
    from runtime.place import LOST_SHARE, Place
    from runtime.watchdog import Limits
    from runtime.writers import check_loggers

    check_loggers(arguments.loggers)
    options = RunOptions(
        iterations=arguments.iterations,
        overwrite=arguments.overwrite,
        limits=Limits(arguments.detect_within, arguments.hang_factor, arguments.timeout),
        max_restarts=arguments.max_restarts,
        saving=SaveOptions(every=arguments.save_every, keep=arguments.keep),
        pin=arguments.pin,
        trust=arguments.trust,
        place=Place(
            nnodes=arguments.nnodes,
            node=arguments.node_rank,
            endpoint=arguments.rdzv_endpoint,
            join_timeout_s=arguments.join_timeout,
            lost_s=LOST_SHARE * arguments.detect_within,
        ),
        watching=Watching(tuple(arguments.loggers), arguments.samples, arguments.log_format),
    )
    plan: Path | None = arguments.plan if arguments.plan is not None else arguments.other_plan
    if plan is not None:
        _warn_of_other_device(plan, trust=arguments.trust)
    with redirect_stdout(sys.stderr if arguments.log_format == "json" else sys.stdout):
        if arguments.resume is not None:
            resume_run(arguments.resume, plan, arguments.checkpoint, options)
        elif plan is not None:
            run_plan(plan, arguments.out if arguments.out is not None else default_out(plan), options)
    return 0


def _by_launcher(arguments: argparse.Namespace) -> int:
    """Starts this command on every node through Slurm or Ray."""
    plan: Path | None = arguments.plan or arguments.other_plan
    if arguments.resume is not None:
        out: Path = arguments.resume
        plan = plan if plan is not None else out / "plan.yaml"
    else:
        assert plan is not None  # _check_run has seen to it
        out = arguments.out if arguments.out is not None else default_out(plan)
    return launch(arguments, arguments.given, plan, out)


def default_out(plan: Path) -> Path:
    """Where a run's output goes unless the user says otherwise."""
    return Path("out") / plan.stem


def _warn_of_other_device(path: Path, *, trust: bool) -> None:
    """Says so where the plan's costs are of another device. A profile that is gone says nothing.

    A built-in profile of hosts is of none in particular; the comparison at the run's end says so.
    """
    from cost_models.profile import load_profile
    from realloc.comparison import is_host
    from realloc.plan import read_plan
    from runtime.profiler import found_device
    from runtime.supported import other_device

    try:
        profile = load_profile(read_plan(path, trust=trust).cluster.device)
    except ReallocError:
        return  # the run itself says what is wrong with the plan; it needs no profile
    found, planned = found_device(), profile.provenance.device
    if profile.provenance.source == "measured":
        warning = other_device(planned, found)
    elif not (is_host(planned) and is_host(found)):
        warning = other_device(planned, found, how="taken from data sheets of")
    else:
        warning = None
    if warning is not None:
        print(f"realloc: warning: {warning}", file=sys.stderr)


def _check_run(arguments: argparse.Namespace) -> None:
    """Raises InputError for options of `run` that contradict each other."""
    if arguments.plan is not None and arguments.other_plan is not None:
        raise InputError(
            f"the plan is given twice, as {arguments.plan} and as --plan {arguments.other_plan}."
        )
    if arguments.resume is None:
        if arguments.checkpoint is not None:
            raise InputError("--from names a checkpoint to continue from; give the run's folder as --resume.")
        if arguments.plan is None and arguments.other_plan is None:
            raise InputError("give a plan to run, or --resume DIR to continue a run.")
    elif arguments.out is not None or arguments.overwrite:
        option = "--out" if arguments.out is not None else "--overwrite"
        raise InputError(f"{option} is for a new run; --resume goes on in the folder of the old one.")
