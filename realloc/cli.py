"""The command line: turns arguments into calls of the other packages, and errors into messages.

The one module that knows every package. It imports them inside the commands, so that help comes at
once and planning never imports torch. It decides nothing about plans or runs.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.cli_arguments import build_parser
from realloc.errors import InputError, ReallocError

if TYPE_CHECKING:
    from realloc.cluster import Cluster
    from realloc.experiment import Experiment

INTERRUPTED = 130
"""What a shell reports for a program that SIGINT ended."""
BROKEN_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 for bad input, 1 for a run that failed.

    `argv` are the arguments after the program's name; None takes the process's. Raises SystemExit
    (with code 2) for arguments that argparse refuses, and whatever is a bug of ours.
    """
    commands = {"search": _search, "run": _run, "export": _export, "profile": _profile, "check": _check}
    arguments = build_parser(commands).parse_args(argv)
    here = str(Path.cwd())
    if here not in sys.path:
        # for a user's own algorithms and rewards; last, so that nothing here hides an installed module
        sys.path.append(here)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except ReallocError as error:
        print(f"realloc: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("realloc: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return BROKEN_PIPE


def _reader_is_gone() -> bool:
    """Whether whoever read our output has stopped (`realloc ... | head`); silences it if so."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by an object without a file
        return False
    poll = select.poll()
    poll.register(output, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        # Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _search(arguments: argparse.Namespace) -> int:
    from planner.api import search_plan
    from planner.report import report_json, report_text
    from realloc.experiment import read_experiment
    from realloc.plan import write_plan

    output: Path | None = arguments.output
    experiment = read_experiment(arguments.experiment)
    if output is not None:
        _check_output(output, arguments.experiment)
    cluster = _cluster(arguments, experiment)
    result = search_plan(
        experiment,
        cluster,
        method=arguments.method,
        time_limit_s=arguments.time_limit,
        seed=arguments.seed,
    )
    if output is not None:
        write_plan(result.plan, output)
    if arguments.json:
        print(report_json(result))
        return 0
    print(report_text(result))
    if output is None:
        print("The plan was not written; give -o plan.yaml to keep it.")
    else:
        print(f"Wrote {output}; run it with: realloc run {output}")
    return 0


def _check_output(output: Path, source: Path) -> None:
    """Refuses, before the work begins, an output that could not be written or would hurt."""
    if output.is_dir():
        raise InputError(f"-o {output}: is a directory; name a file in it.")
    if output.exists() and output.samefile(source):
        raise InputError(f"-o {output}: would overwrite the experiment; name another file.")


def _cluster(arguments: argparse.Namespace, experiment: Experiment) -> Cluster:
    """The cluster of `--cluster`, else the experiment's; single options replace parts of it."""
    from realloc.cluster import cluster_content, parse_cluster, read_cluster
    from realloc.files import Reader

    given = {"nodes": arguments.nodes, "gpus_per_node": arguments.gpus_per_node, "device": arguments.device}
    given = {key: value for key, value in given.items() if value is not None}
    if arguments.cluster is not None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise InputError(f"--cluster and --{option} both describe the cluster; give one of them.")
        return read_cluster(arguments.cluster)
    cluster = experiment.cluster
    if cluster is None and not given:
        raise InputError(
            f"{arguments.experiment}: names no cluster. Give --cluster FILE, or --nodes N --gpus-per-node G "
            "--device NAME, or write into the experiment, for example: "
            "cluster: {nodes: 2, gpus_per_node: 8, device: h100-sxm}"
        )
    if cluster is not None and "device" in given:
        cluster = replace(cluster, memory_bytes=None)  # it was the other device's
    content = given if cluster is None else {**cluster_content(cluster), **given}
    missing = [key for key in ("gpus_per_node", "device") if key not in content]
    if missing:
        raise InputError(
            f"{arguments.experiment}: names no cluster, so --{missing[0].replace('_', '-')} is needed beside "
            f"--{next(iter(given)).replace('_', '-')}."
        )
    return parse_cluster(Reader(content, "command line: cluster"), Path.cwd())


def _run(arguments: argparse.Namespace) -> int:
    _check_run(arguments)
    from runtime.checkpoint import SaveOptions
    from runtime.launch import RunOptions, resume_run, run_plan

    options = RunOptions(
        iterations=arguments.iterations,
        overwrite=arguments.overwrite,
        timeout_s=arguments.timeout,
        saving=SaveOptions(every=arguments.save_every, keep=arguments.keep),
    )
    plan: Path | None = arguments.plan if arguments.plan is not None else arguments.other_plan
    if arguments.resume is not None:
        resume_run(arguments.resume, plan, arguments.checkpoint, options)
    elif plan is not None:
        run_plan(plan, arguments.out if arguments.out is not None else Path("out") / plan.stem, options)
    return 0


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


def _export(arguments: argparse.Namespace) -> int:
    from runtime.export import export_checkpoint

    what = export_checkpoint(
        arguments.out, arguments.folder, iteration=arguments.iteration, role=arguments.role
    )
    print(f"Wrote {arguments.folder}: {what}")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from runtime.profiler import run_profile

    if arguments.output.is_dir():
        raise InputError(f"-o {arguments.output}: is a directory; name a file in it.")
    run_profile(arguments.output, arguments.ranks, arguments.quick)
    print(f"Wrote {arguments.output}; plan with it: realloc search EXPERIMENT --device {arguments.output}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    code = 0
    for path in arguments.files:
        try:
            print(f"{path}: {_summary(path)}")
        except ReallocError as error:
            print(f"realloc: error: {error}", file=sys.stderr)
            code = error.exit_code
    return code


def _summary(path: Path) -> str:
    """One line about a file that was read and found right. Raises InputError."""
    from realloc.files import kind_of

    kind = "trace" if path.suffix == ".jsonl" else kind_of(path)
    summaries: Mapping[str, Callable[[Path], str]] = {
        "experiment": _experiment_summary,
        "cluster": _cluster_summary,
        "plan": _plan_summary,
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
    return (
        f"{experiment.algorithm} of {models}; {_plural(len(experiment.graph().calls), 'call')} and "
        f"{_plural(workload.sequences, 'sequence')} an iteration, prompts up to {workload.prompt.maximum} "
        f"and responses up to {workload.response.maximum} tokens"
    )


def _cluster_summary(path: Path) -> str:
    from realloc.cluster import read_cluster

    cluster = read_cluster(path)
    return f"{cluster}, {_plural(cluster.num_gpus, 'GPU')}"


def _plan_summary(path: Path) -> str:
    from realloc.plan import read_plan

    plan = read_plan(path)
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


if __name__ == "__main__":
    sys.exit(main())
