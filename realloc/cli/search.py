"""`realloc search`: an experiment in, a plan and its explanation out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from realloc.cli.cluster import add_cluster, chosen_cluster
from realloc.cli.values import INTERRUPTED, Commands, check_output, count, seconds


def add(commands: Commands) -> None:
    search = commands.add_parser(
        "search",
        help="find the fastest execution plan that fits in memory",
        description="Finds an execution plan for an experiment and explains it. The cluster is the "
        "experiment's own unless options give another.",
        allow_abbrev=False,
    )
    search.add_argument("experiment", metavar="EXPERIMENT", type=Path, help="the experiment's YAML file")
    search.add_argument("-o", "--output", metavar="PLAN", type=Path, help="write the plan to this file")
    add_cluster(search)
    how = search.add_argument_group("search")
    how.add_argument("--method", metavar="M", help="the search method (default: the planner's choice)")
    how.add_argument("--time-limit", type=seconds, metavar="S", help="stop after this many seconds")
    how.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the search (default: 0)")
    how.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    search.set_defaults(command=_search)


def _search(arguments: argparse.Namespace) -> int:
    from planner.api import search_plan
    from planner.report import report_json, report_text
    from realloc.experiment import read_experiment
    from realloc.plan import write_plan

    output: Path | None = arguments.output
    experiment = read_experiment(arguments.experiment)
    if output is not None:
        check_output(output, arguments.experiment)
    cluster = chosen_cluster(arguments, experiment)
    result = search_plan(
        experiment,
        cluster,
        method=arguments.method,
        time_limit_s=arguments.time_limit,
        seed=arguments.seed,
    )
    if output is not None:
        write_plan(result.plan, output)
    if result.interrupted:
        print(
            f"realloc: interrupted after {result.elapsed_s:.1f} s; this is the best plan so far, "
            f"{result.gap:.1%} or less above the best one.",
            file=sys.stderr,
        )
    code = INTERRUPTED if result.interrupted else 0
    if arguments.json:
        print(report_json(result))
        return code
    print(report_text(result))
    if output is None:
        print("The plan was not written; give -o plan.yaml to keep it.")
    else:
        print(f"Wrote {output}; run it with: realloc run {output}")
        print(
            f"Why it is so: realloc explain {output}, realloc report {output} -o report.html, "
            f"realloc compare {arguments.experiment}"
        )
    return code
