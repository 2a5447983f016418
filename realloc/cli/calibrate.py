"""`realloc calibrate`: a run improves the hardware profile that plans are priced with."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from realloc.cli.diff import read_run
from realloc.cli.values import Commands, add_trust, check_output
from realloc.errors import InputError


def add(commands: Commands) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="improve a hardware profile by a run's trace",
        description="Compares a run with what its profile predicts at the lengths the run had, and writes "
        "a profile with a factor for every term of every kind of call. Plans priced with it are closer to "
        "what runs take.",
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
    print(
        f"seconds per iteration of {run}: {result.measured_s:.4g} measured, {result.before_s:.4g} predicted "
        f"before, {result.after_s:.4g} now"
    )
    if busy := crowded(trace):
        print(f"note: {busy}, and the factors have that in them; calibrate with a run on a quiet machine.")
    print(f"Wrote {arguments.output}; plan with it: realloc search EXPERIMENT --device {arguments.output}")
    return 0
