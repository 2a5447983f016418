"""The command line: turns arguments into calls of the other packages, and errors into messages.

The one module that knows every package. It imports them inside the commands, so that help comes at
once and planning never imports torch. It decides nothing about plans or runs.
"""

from __future__ import annotations

import argparse
import math
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from realloc import __version__
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
    arguments = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realloc",
        description="Plans and runs RLHF: every model function call on its own GPUs with its own parallel "
        "strategy, parameters reallocated in between.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"realloc {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_search(commands)
    _add_run(commands)
    _add_profile(commands)
    check = commands.add_parser("check", help="validate files and say what is in them", allow_abbrev=False)
    check.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        type=Path,
        help="an experiment, a cluster, a plan, a hardware profile or a trace",
    )
    check.set_defaults(command=_check)
    return parser


def _add_search(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    search = commands.add_parser(
        "search",
        help="find the fastest execution plan that fits in memory",
        description="Finds an execution plan for an experiment and explains it. The cluster is the "
        "experiment's own unless options give another.",
        allow_abbrev=False,
    )
    search.add_argument("experiment", metavar="EXPERIMENT", type=Path, help="the experiment's YAML file")
    search.add_argument("-o", "--output", metavar="PLAN", type=Path, help="write the plan to this file")
    cluster = search.add_argument_group("cluster")
    cluster.add_argument("--cluster", metavar="FILE", type=Path, help="a cluster's YAML file")
    cluster.add_argument("--nodes", type=int, metavar="N", help="number of nodes")
    cluster.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs in each node")
    cluster.add_argument("--device", metavar="NAME", help="a hardware profile: a name, or a YAML file")
    how = search.add_argument_group("search")
    how.add_argument("--method", metavar="M", help="the search method (default: the planner's choice)")
    how.add_argument("--time-limit", type=_seconds, metavar="S", help="stop after this many seconds")
    how.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of the search (default: 0)")
    how.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    search.set_defaults(command=_search)


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser("run", help="run a plan", allow_abbrev=False)
    run.add_argument("plan", metavar="PLAN", type=Path, help="the plan's YAML file")
    run.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where checkpoints, metrics and the trace go (default: out/ and the plan's name)",
    )
    run.add_argument(
        "--iterations", type=_positive, metavar="N", help="run this many iterations instead of the plan's"
    )
    run.add_argument("--overwrite", action="store_true", help="delete an earlier run's output in the folder")
    run.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="how long a rank waits for another before the run fails (default: 600 seconds)",
    )
    run.set_defaults(command=_run)


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    profile = commands.add_parser(
        "profile", help="measure this machine and write its hardware profile", allow_abbrev=False
    )
    profile.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("profile.yaml"),
        help="the profile's file (default: profile.yaml)",
    )
    profile.add_argument(
        "--ranks", type=_positive, default=2, metavar="N", help="processes that measure links (default: 2)"
    )
    profile.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    profile.set_defaults(command=_profile)


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**31 - 1}")
    return value


def _positive(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


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
    from runtime.launch import RunOptions, run_plan

    plan: Path = arguments.plan
    out = arguments.out if arguments.out is not None else Path("out") / plan.stem
    options = RunOptions(
        iterations=arguments.iterations, overwrite=arguments.overwrite, timeout_s=arguments.timeout
    )
    run_plan(plan, out, options)
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
