"""Importing modules that a file names by `module:name`, and what others' code raises as a message.

Whether they may be imported at all, `realloc.trust` decides.
"""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
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
    return text + place_of(error, caller)


def place_of(error: BaseException, caller: str = "") -> str:
    """` (FILE, line N)` of the last line that ran before the error, outside of installed packages if any did.

    Empty where there is none, and where it is in `caller` or known to the error itself.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    own = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    if isinstance(error, SyntaxError) or not frames:
        return ""
    frame = (own or frames)[-1]
    return "" if frame.filename == caller else f" ({frame.filename}, line {frame.lineno})"
