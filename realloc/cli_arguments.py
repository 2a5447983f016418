"""What may be typed: the commands, their options and the words that explain them.

Decides how arguments are written and which single values are refused; what they mean together, and
what is done with them, is the command line's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from realloc import __version__

Command: TypeAlias = Callable[[argparse.Namespace], int]
if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser; what it returns for a command has that command's function as `command`."""
    parser = argparse.ArgumentParser(
        prog="realloc",
        description="Plans and runs RLHF: every model function call on its own GPUs with its own parallel "
        "strategy, parameters reallocated in between.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"realloc {__version__}")
    added = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_search(added)
    _add_run(added)
    _add_export(added)
    _add_profile(added)
    check = added.add_parser("check", help="validate files and say what is in them", allow_abbrev=False)
    check.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        type=Path,
        help="an experiment, a cluster, a plan, a hardware profile or a trace",
    )
    for name, command in commands.items():
        added.choices[name].set_defaults(command=command)
    return parser


def _add_search(commands: Commands) -> None:
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


def _add_run(commands: Commands) -> None:
    run = commands.add_parser("run", help="run a plan", allow_abbrev=False)
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
    saving = run.add_argument_group("checkpoints")
    saving.add_argument(
        "--save-every",
        type=_count,
        default=10,
        metavar="N",
        help="write one every N iterations and after the last; 0: only after the last (default: 10)",
    )
    saving.add_argument(
        "--keep", type=_positive, default=2, metavar="K", help="keep the last K of them (default: 2)"
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


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export", help="write a checkpoint's model as a Hugging Face folder", allow_abbrev=False
    )
    export.add_argument("out", metavar="DIR", type=Path, help="the folder of the run (its --out)")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="where the model goes: a new folder")
    export.add_argument(
        "--iteration", type=_count, metavar="N", help="the checkpoint after N iterations (default: the last)"
    )
    export.add_argument("--role", metavar="ROLE", help="which trained role (default: the only one)")


def _add_profile(commands: Commands) -> None:
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
