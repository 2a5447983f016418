"""The command line: turns arguments into calls of the other packages, and errors into messages.

The one package that knows every other, a module a command. Its modules import the others inside the
commands, so that help comes at once and planning never imports torch. It decides nothing about
plans or runs.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from realloc import __version__
from realloc.cli import (
    calibrate,
    check,
    compare,
    diff,
    doctor,
    explain,
    export,
    fit,
    graph,
    lengths,
    profile,
    report,
    run,
    search,
    simulate,
)
from realloc.cli.values import INTERRUPTED
from realloc.errors import ReallocError

BROKEN_PIPE = 141
"""What a shell reports for a program that SIGPIPE ended."""


def build_parser() -> argparse.ArgumentParser:
    """The parser; what it returns for a command has that command's function as `command`."""
    parser = argparse.ArgumentParser(
        prog="realloc",
        description="Plans and runs RLHF: every model function call on its own GPUs with its own parallel "
        "strategy, parameters reallocated in between.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"realloc {__version__}")
    added = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (
        search,
        explain,
        report,
        compare,
        fit,
        graph,
        simulate,
        run,
        doctor,
        diff,
        calibrate,
        lengths,
        export,
        profile,
        check,
    ):
        command.add(added)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 for bad input, 1 for a run that failed.

    `argv` are the arguments after the program's name; None takes the process's. Raises SystemExit
    (with code 2) for arguments that argparse refuses, and whatever is a bug of ours.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = build_parser().parse_args(given, argparse.Namespace(given=given))
    # torch then counts GPUs without opening them: ranks forked from this process could not open them again
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    here = str(Path.cwd())
    if here not in sys.path:
        # for a user's own algorithms and rewards; last, so that nothing here hides an installed module
        sys.path.append(here)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except ReallocError as error:
        print(f"realloc: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("realloc: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return BROKEN_PIPE


def _reader_is_gone() -> bool:
    """Whether whoever read our output has stopped (`realloc ... | head`); silences it if so."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by an object without a file
        return False
    poll = select.poll()
    poll.register(output, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        # Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone
