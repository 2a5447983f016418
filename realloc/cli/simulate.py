"""`realloc simulate`: a plan's timeline, without running it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from realloc.cli.values import Commands, add_trust, check_output


def add(commands: Commands) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="show a plan's timeline, critical path and memory",
        description="Prices a plan with its device's profile and simulates it to the steady state.",
        allow_abbrev=False,
    )
    simulate.add_argument("plan", metavar="PLAN", type=Path, help="the plan's YAML file")
    simulate.add_argument("--device", metavar="NAME", help="price with this profile: a name, or a YAML file")
    simulate.add_argument(
        "--trace", metavar="FILE", type=Path, help="write the timeline as JSON for ui.perfetto.dev"
    )
    simulate.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_trust(simulate)
    simulate.set_defaults(command=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    from planner.predict import assess
    from planner.timeline import predicted_spans, timeline_content, timeline_text
    from realloc.chrome_trace import chrome_trace
    from realloc.files import write_text
    from realloc.plan import read_plan

    if arguments.trace is not None:
        check_output(arguments.trace, arguments.plan)
    assessment = assess(read_plan(arguments.plan, trust=arguments.trust), arguments.device)
    if arguments.trace is not None:
        write_text(arguments.trace, chrome_trace({"predicted": tuple(predicted_spans(assessment))}))
    if arguments.json:
        print(json.dumps(timeline_content(assessment), indent=2))
        return 0
    print(timeline_text(assessment))
    if arguments.trace is not None:
        print(f"Wrote {arguments.trace}; open it at https://ui.perfetto.dev")
    return 0
