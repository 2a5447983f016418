"""`realloc diff`: a plan's predictions against a run of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.cli.values import Commands, add_trust, check_output
from realloc.errors import InputError

if TYPE_CHECKING:
    from realloc.plan import ExecutionPlan
    from realloc.trace import Trace


def add(commands: Commands) -> None:
    diff = commands.add_parser(
        "diff",
        help="compare a plan's predictions with a run of it",
        description="Predicted against measured seconds, by call and by term, and what likely makes terms "
        "differ by more than 20%%.",
        allow_abbrev=False,
    )
    diff.add_argument("plan", metavar="PLAN", type=Path, help="the plan's YAML file")
    diff.add_argument(
        "run", metavar="RUN", type=Path, help="the run's folder (its --out), or its trace.jsonl"
    )
    diff.add_argument(
        "--device", metavar="NAME", help="predict anew with this profile: a name, or a YAML file"
    )
    diff.add_argument(
        "--trace", metavar="FILE", type=Path, help="write both timelines as JSON for ui.perfetto.dev"
    )
    diff.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_trust(diff)
    diff.set_defaults(command=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    from realloc.comparison import compare
    from realloc.comparison_text import comparison_content, comparison_text
    from realloc.plan import read_plan

    if arguments.trace is not None:
        check_output(arguments.trace, arguments.plan)
    plan = read_plan(arguments.plan, trust=arguments.trust)
    trace = read_run(arguments.run, plan, trust=arguments.trust)
    if plan.predictions is None or arguments.device is not None:
        from planner.predict import predict

        plan = predict(plan, arguments.device)
    comparison = compare(plan, trace)
    if arguments.trace is not None:
        _write_timelines(arguments.trace, plan, trace)
    if arguments.json:
        print(json.dumps(comparison_content(comparison), indent=2))
    else:
        print(comparison_text(comparison))
    return 0


def _write_timelines(path: Path, plan: ExecutionPlan, trace: Trace) -> None:
    from planner.predict import assess
    from planner.timeline import predicted_spans
    from realloc.chrome_trace import chrome_trace, measured_spans
    from realloc.files import write_text

    timelines = {
        "predicted": tuple(predicted_spans(assess(plan))),
        "measured": tuple(measured_spans(trace)),
    }
    write_text(path, chrome_trace(timelines))


def read_run(run: Path, plan: ExecutionPlan | None = None, *, trust: bool = False) -> Trace:
    """The trace of a run's folder, or of a trace file. Raises InputError when it is not of the plan."""
    from realloc.plan import read_plan
    from realloc.trace import read_trace

    if not run.is_dir():
        return read_trace(run)
    if not (run / "trace.jsonl").exists():
        raise InputError(
            f"{run}: has no trace.jsonl; give the folder of a run that has ended well (its --out), or a "
            f"trace file."
        )
    if plan is not None and (run / "plan.yaml").exists():
        ran = read_plan(run / "plan.yaml", trust=trust)
        for name, placement in plan.placements.items():
            if name in ran.placements and ran.placements[name] != placement:
                raise InputError(
                    f"{run}: the run is of another plan: {name} ran as {ran.placements[name]}, the plan has "
                    f"{placement}."
                )
    return read_trace(run / "trace.jsonl")
