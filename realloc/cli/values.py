"""Single values that may be typed, and which of them are refused."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TypeAlias

from realloc.errors import InputError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command's module adds its parser to."""

INTERRUPTED = 130
"""The exit code that a shell reports for a program that SIGINT ended."""


def seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def count(text: str) -> int:
    """A whole number from 0."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**31 - 1}")
    return value


def positive(text: str) -> int:
    """A whole number from 1."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option of every command that reads a plan."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let code that the plan names and that does not come with realloc run: rewards, an algorithm",
    )


def endpoint(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 address in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as node0:29400")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_output(output: Path, source: Path | None = None) -> None:
    """Refuses, before the work begins, an output that could not be written or would hurt."""
    if output.is_dir():
        raise InputError(f"-o {output}: is a directory; name a file in it.")
    if source is not None and output.exists() and output.samefile(source):
        raise InputError(f"-o {output}: would overwrite the experiment; name another file.")
