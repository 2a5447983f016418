"""Importing modules that a file names by `module:name`, and what others' code raises as a message.

Whether they may be imported at all, `realloc.trust` decides.
"""

from __future__ import annotations

import importlib
import traceback
from types import ModuleType

from realloc.errors import InputError

LONGEST = 300
"""Characters of what an error says that a message repeats."""


def import_named(module: str, where: str) -> ModuleType:
    """The module. Raises InputError, which names the line, for one that is missing or fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        problem = str(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (somebody's module may raise anything)
        problem = described(error)
    raise InputError(f"{where}: cannot import '{module}': {problem}.")


def described(error: BaseException, caller: str = "") -> str:
    """Type, message and the line that raised, all in one line.

    `caller`: our file that has called the code. An error that arose there, such as a call with arguments
    that the code does not take, names no line.
    """
    text = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").splitlines())
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    if isinstance(error, SyntaxError):  # which says itself where it is
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if not f.filename.startswith("<frozen")), None)
    if place is None or place.filename == caller:
        return text
    return f"{text} ({place.filename}, line {place.lineno})"
