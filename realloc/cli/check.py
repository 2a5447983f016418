"""`realloc check`: reads any of the files and says what is in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.cli.values import Commands, add_trust
from realloc.errors import ReallocError

if TYPE_CHECKING:
    from realloc.experiment import Experiment


def add(commands: Commands) -> None:
    check = commands.add_parser("check", help="validate files and say what is in them", allow_abbrev=False)
    check.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        type=Path,
        help="an experiment, a cluster, a plan, a hardware profile or a trace",
    )
    add_trust(check)
    check.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    code = 0
    for path in arguments.files:
        try:
            print(f"{path}: {_summary(path, trust=arguments.trust)}")
        except ReallocError as error:
            print(f"realloc: error: {error}", file=sys.stderr)
            code = error.exit_code
    return code


def _summary(path: Path, *, trust: bool) -> str:
    """One line about a file that was read and found right. Raises InputError."""
    from realloc.files import kind_of

    kind = "trace" if path.suffix == ".jsonl" else kind_of(path)
    summaries: Mapping[str, Callable[[Path], str]] = {
        "experiment": _experiment_summary,
        "cluster": _cluster_summary,
        "plan": lambda path: _plan_summary(path, trust=trust),
        "profile": _profile_summary,
        "trace": _trace_summary,
    }
    return f"{kind}: {summaries[kind](path)}"


def _experiment_summary(path: Path) -> str:
    from realloc.experiment import read_experiment

    return _about(read_experiment(path))


def _about(experiment: Experiment) -> str:
    workload = experiment.workload
    models = ", ".join(f"{role} {Path(spec.model).name}" for role, spec in experiment.models.items())
    text = (
        f"{experiment.algorithm} of {models}; {_plural(len(experiment.graph().calls), 'call')} and "
        f"{_plural(workload.sequences, 'sequence')} an iteration, prompts up to {workload.prompt.maximum} "
        f"and responses up to {workload.response.maximum} tokens"
    )
    if (pretrain := experiment.pretrain) is not None:
        text += f"; {_plural(pretrain.sequences, 'text')} mixed in, up to {pretrain.tokens.maximum} tokens"
    return text


def _cluster_summary(path: Path) -> str:
    from realloc.cluster import read_cluster

    cluster = read_cluster(path)
    return f"{cluster}, {_plural(cluster.num_gpus, 'GPU')}"


def _plan_summary(path: Path, *, trust: bool) -> str:
    from realloc.plan import read_plan

    plan = read_plan(path, trust=trust)
    text = f"{_about(plan.experiment)}; on {plan.cluster}"
    if plan.predictions is not None:
        text += f"; {plan.predictions.iteration_s:.4g} s an iteration predicted"
    return text


def _profile_summary(path: Path) -> str:
    from cost_models.profile import read_profile

    profile = read_profile(path)
    gib = profile.memory_bytes / 2**30
    return f"{profile.provenance.device}, {profile}, {gib:.4g} GiB, {', '.join(d for d, _ in profile.matmul)}"


def _trace_summary(path: Path) -> str:
    from realloc.trace import read_trace

    trace = read_trace(path)
    iterations = len({record.iteration for record in trace.records})
    text = f"{_plural(trace.world_size, 'rank')}, {_plural(iterations, 'iteration')}, "
    text += _plural(len(trace.records), "record")
    if trace.records:
        text += f", {trace.iteration_seconds():.4g} s an iteration"
    return text


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
