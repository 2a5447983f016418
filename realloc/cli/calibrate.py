"""`realloc calibrate`: a run improves the hardware profile that plans are priced with."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from realloc.cli.diff import read_run
from realloc.cli.values import Commands, add_trust, check_output
from realloc.errors import InputError

if TYPE_CHECKING:
    from planner.calibrate import Calibrated


def add(commands: Commands) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="improve a hardware profile by a run's trace",
        description="Compares a run with what its profile predicts at the lengths the run had, and writes "
        "a profile with a factor for every term of every kind of call. Plans priced with it are closer to "
        "what runs take. How much slower the machine ran than when it was profiled is left out of the "
        "factors where the run and the profile tell it.",
        allow_abbrev=False,
    )
    calibrate.add_argument("run", metavar="RUN", type=Path, help="the run's folder (its --out)")
    calibrate.add_argument(
        "-o", "--output", metavar="FILE", type=Path, required=True, help="the new profile's file"
    )
    calibrate.add_argument(
        "--device", metavar="NAME", help="the profile to improve (default: the one of the run's plan)"
    )
    add_trust(calibrate)
    calibrate.set_defaults(command=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from cost_models.profile import load_profile, write_profile
    from planner.calibrate import calibrate
    from realloc.comparison import crowded
    from realloc.plan import read_plan

    run: Path = arguments.run
    if not (run / "plan.yaml").exists():
        raise InputError(f"{run}: is no run's folder: it has no plan.yaml.")
    check_output(arguments.output)
    plan = read_plan(run / "plan.yaml", trust=arguments.trust)
    trace = read_run(run)
    result = calibrate(
        plan,
        trace,
        load_profile(arguments.device or plan.cluster.device),
        run=str(run.resolve()),
        date=datetime.now(UTC).date().isoformat(),
        name=arguments.output.stem,
    )
    write_profile(result.profile, arguments.output)
    for quantity, factor in sorted(result.factors.items(), key=lambda item: item[0]):
        print(f"{quantity:32} x {factor:.3f}")
    for line in _summary(run, result, crowded(trace)):
        print(line)
    print(f"Wrote {arguments.output}; plan with it: realloc search EXPERIMENT --device {arguments.output}")
    return 0


def _summary(run: Path, result: Calibrated, busy: str) -> Iterable[str]:
    """Before and after, and what of the machine's pace the factors have in them."""
    from realloc.comparison import pace_text

    pace, measured_s = result.pace, result.measured_s
    measured = f"{measured_s:.4g} measured"
    if pace is not None:
        measured += f", {measured_s / pace.ratio:.4g} at the profile's pace"
    yield (
        f"seconds per iteration of {run}: {measured}, {result.before_s:.4g} predicted before, "
        f"{result.after_s:.4g} now"
    )
    if pace is not None:
        yield f"{pace_text(pace)}; the factors are without that."
        if busy:
            yield f"note: {busy}; what that does to messages has no pace: calibrate on a quiet machine."
    elif busy:
        yield f"note: {busy}, and the factors have that in them; calibrate with a run on a quiet machine."
    elif result.profile.attention.per_sequence:
        yield (
            "note: the profile or the run does not tell the machine's pace; if it ran slower than when it "
            "was profiled, the factors have that in them."
        )
