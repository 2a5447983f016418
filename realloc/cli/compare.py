"""`realloc compare`: the searched plan beside the plans that rules of thumb make."""

from __future__ import annotations

import argparse
from pathlib import Path

from realloc.cli.cluster import add_cluster, chosen_cluster
from realloc.cli.values import Commands, count, seconds


def add(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="put the searched plan beside the plans that rules of thumb make",
        description="Searches a plan, makes the plans that other systems' rules of thumb would make, and "
        "says why the slower ones lose. The cluster is the experiment's own unless options give another.",
        allow_abbrev=False,
    )
    compare.add_argument("experiment", metavar="EXPERIMENT", type=Path, help="the experiment's YAML file")
    add_cluster(compare)
    how = compare.add_argument_group("search")
    how.add_argument("--time-limit", type=seconds, metavar="S", help="search for this many seconds at most")
    how.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the search (default: 0)")
    compare.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    compare.set_defaults(command=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from planner.api import search_plan
    from planner.compare import compare
    from planner.compare_text import comparison_json, comparison_text
    from realloc.experiment import read_experiment

    experiment = read_experiment(arguments.experiment)
    cluster = chosen_cluster(arguments, experiment)
    result = search_plan(experiment, cluster, time_limit_s=arguments.time_limit, seed=arguments.seed)
    found = compare(result.plan)
    print(comparison_json(found) if arguments.json else comparison_text(found))
    return 0
