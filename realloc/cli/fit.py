"""`realloc fit`: whether an experiment fits, on how many GPUs, and how many are worth having."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.cli.cluster import add_cluster, chosen_cluster
from realloc.cli.values import Commands, check_output, count, positive, seconds

if TYPE_CHECKING:
    from realloc.cluster import Cluster
    from realloc.experiment import Experiment
    from realloc.plan import ExecutionPlan


def add(commands: Commands) -> None:
    fit = commands.add_parser(
        "fit",
        help="say whether an experiment fits, on how many GPUs, and how many are worth having",
        description="Searches a plan for clusters of every size: slices of a node, then 1, 2, 4, ... nodes. "
        "Nodes and device are the experiment's own unless options give others.",
        allow_abbrev=False,
    )
    fit.add_argument("experiment", metavar="EXPERIMENT", type=Path, help="the experiment's YAML file")
    add_cluster(fit)
    fit.add_argument(
        "--max-gpus",
        type=positive,
        metavar="N",
        help="the largest cluster (default: the experiment's, or 64)",
    )
    fit.add_argument(
        "--time-limit", type=seconds, default=5.0, metavar="S", help="search each size so long (default: 5)"
    )
    fit.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the search (default: 0)")
    fit.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    fit.add_argument("--plot", metavar="SVG", type=Path, help="write a plot of time and cost over GPUs")
    fit.set_defaults(command=_fit)


def _fit(arguments: argparse.Namespace) -> int:
    from planner.api import search_plan
    from planner.fit import fit
    from planner.fit_plot import fit_plot
    from planner.fit_text import fit_json, fit_text
    from realloc.experiment import read_experiment
    from realloc.files import write_text

    plot: Path | None = arguments.plot
    experiment = read_experiment(arguments.experiment)
    if plot is not None:
        check_output(plot, arguments.experiment)
    cluster = chosen_cluster(arguments, experiment)

    def search(experiment: Experiment, cluster: Cluster) -> ExecutionPlan:
        limit_s: float = arguments.time_limit
        return search_plan(experiment, cluster, time_limit_s=limit_s, seed=arguments.seed).plan

    found = fit(experiment, cluster, arguments.max_gpus or max(64, cluster.num_gpus), search)
    if plot is not None:
        write_text(plot, fit_plot(found))
    print(fit_json(found) if arguments.json else fit_text(found))
    if plot is not None and not arguments.json:
        print(f"Wrote {plot}.")
    return 0
