"""`realloc report`: a plan as one self-contained web page."""

from __future__ import annotations

import argparse
from pathlib import Path

from realloc.cli.values import Commands, add_trust, check_output, seconds


def add(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="draw a plan as one self-contained web page",
        description="Writes one HTML page, which needs nothing else: which call runs where and when, memory "
        "over time, what the time is spent on (measured too, given a run), and why.",
        allow_abbrev=False,
    )
    report.add_argument("plan", metavar="PLAN", type=Path, help="a plan's YAML file")
    report.add_argument("-o", "--output", metavar="HTML", type=Path, required=True, help="the page to write")
    report.add_argument(
        "--run", metavar="DIR", type=Path, help="the output folder of a run of the plan, or its trace.jsonl"
    )
    report.add_argument(
        "--time-limit",
        type=seconds,
        default=10.0,
        metavar="S",
        help="look for other placements for this many seconds at most (default: 10)",
    )
    add_trust(report)
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from planner.explain import explain
    from planner.page.document import plan_page
    from realloc.comparison import check_match
    from realloc.files import write_text
    from realloc.plan import read_plan
    from realloc.trace import read_trace

    output: Path = arguments.output
    check_output(output, arguments.plan)
    plan = read_plan(arguments.plan, trust=arguments.trust)
    trace = None
    if arguments.run is not None:
        run: Path = arguments.run
        trace = read_trace(run / "trace.jsonl" if run.is_dir() else run)
        check_match(plan, trace)
    found = explain(plan, arguments.time_limit)
    write_text(output, plan_page(found, arguments.plan.stem, trace))
    print(f"Wrote {output}; open it in any browser.")
    return 0
