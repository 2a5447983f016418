"""`realloc profile`: measures this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from realloc.cli.values import Commands, check_output, positive


def add(commands: Commands) -> None:
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
        "--ranks", type=positive, default=2, metavar="N", help="processes that measure links (default: 2)"
    )
    profile.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    profile.set_defaults(command=_profile)


def _profile(arguments: argparse.Namespace) -> int:
    from runtime.profiler import run_profile

    check_output(arguments.output)
    run_profile(arguments.output, arguments.ranks, arguments.quick)
    print(f"Wrote {arguments.output}; plan with it: realloc search EXPERIMENT --device {arguments.output}")
    return 0
