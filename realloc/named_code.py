"""Importing modules that a file names by `module:name`: whatever they raise becomes a message.

Whether they may be imported at all, `realloc.trust` decides.
"""

from __future__ import annotations

import importlib
import traceback
from types import ModuleType

from realloc.errors import InputError


def import_named(module: str, where: str) -> ModuleType:
    """The module. Raises InputError, which names the line, for one that is missing or fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        problem = str(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (somebody's module may raise anything)
        problem = _described(error)
    raise InputError(f"{where}: cannot import '{module}': {problem}.")


def _described(error: BaseException) -> str:
    """Type, message and the last line that is no part of importing."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, SyntaxError):  # which says itself where it is
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if not f.filename.startswith("<frozen")), None)
    return text if place is None else f"{text} ({place.filename}, line {place.lineno})"
