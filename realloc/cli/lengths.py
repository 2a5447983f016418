"""`realloc lengths`: how long a run's sequences were, as an experiment's workload says it."""

from __future__ import annotations

import argparse
from pathlib import Path

from realloc.cli.diff import read_run
from realloc.cli.values import Commands
from realloc.errors import InputError


def add(commands: Commands) -> None:
    lengths = commands.add_parser(
        "lengths",
        help="print the lengths of a run's sequences, to plan with",
        description="Prints prompt and response lengths of a run as the lines of an experiment's workload.",
        allow_abbrev=False,
    )
    lengths.add_argument(
        "run", metavar="RUN", type=Path, help="the run's folder (its --out), or its trace.jsonl"
    )
    lengths.set_defaults(command=_lengths)


def _lengths(arguments: argparse.Namespace) -> int:
    from realloc.lengths import lengths_content, run_lengths

    found = run_lengths(read_run(arguments.run))
    if found is None:
        raise InputError(f"{arguments.run}: the trace says nothing of lengths.")
    for key, lengths in zip(("prompt_tokens", "response_tokens"), found, strict=True):
        content = lengths_content(lengths)
        rows = ", ".join(f"[{tokens}, {share:.4g}]" for tokens, share in content.get("histogram", ()))
        histogram = f", histogram: [{rows}]" if rows else ""
        print(f"{key}: {{max: {lengths.maximum}{histogram}}}")
    return 0
