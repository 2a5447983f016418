"""`realloc explain`: what each call of a plan got and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from realloc.cli.values import Commands, add_trust, seconds


def add(commands: Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="say what each call of a plan got, and why",
        description="Says in words and numbers where the time of a plan goes, what the next best placement "
        "of each call would cost, and what memory has forced. Works on plans written by hand too.",
        allow_abbrev=False,
    )
    explain.add_argument("plan", metavar="PLAN", type=Path, help="a plan's YAML file")
    explain.add_argument(
        "--time-limit",
        type=seconds,
        default=10.0,
        metavar="S",
        help="look for other placements for this many seconds at most (default: 10)",
    )
    explain.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    add_trust(explain)
    explain.set_defaults(command=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from planner.explain import explain
    from planner.explain_text import explanation_json, explanation_text
    from realloc.plan import read_plan

    found = explain(read_plan(arguments.plan, trust=arguments.trust), arguments.time_limit)
    print(explanation_json(found) if arguments.json else explanation_text(found))
    return 0
