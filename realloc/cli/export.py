"""`realloc export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from realloc.cli.values import Commands, count


def add(commands: Commands) -> None:
    export = commands.add_parser(
        "export", help="write a checkpoint's model as a Hugging Face folder", allow_abbrev=False
    )
    export.add_argument("out", metavar="DIR", type=Path, help="the folder of the run (its --out)")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="where the model goes: a new folder")
    export.add_argument(
        "--iteration", type=count, metavar="N", help="the checkpoint after N iterations (default: the last)"
    )
    export.add_argument("--role", metavar="ROLE", help="which trained role (default: the only one)")
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from runtime.export import export_checkpoint

    what = export_checkpoint(
        arguments.out, arguments.folder, iteration=arguments.iteration, role=arguments.role
    )
    print(f"Wrote {arguments.folder}: {what}")
    return 0
