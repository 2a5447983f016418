"""Code that a file names, and whether it may run.

A plan may come from anywhere, and names code: an algorithm `module:Class`, rewards `module:function`. What
belongs to realloc runs; anything else only when the user says so (`--trust`), after having been told what
it is and in which file. An experiment is the user's own: what it names is trusted. Looks for modules
without importing them.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from realloc.errors import InputError

if TYPE_CHECKING:
    from realloc.dataflow import DataflowGraph

OURS = "experiments"
"""The package whose algorithms and functions come with realloc."""


def is_ours(entry: str) -> bool:
    """Whether `module:name` comes with realloc."""
    module, _, name = entry.partition(":")
    return module.startswith(f"{OURS}.") and name.isidentifier() and not name.startswith("_")


def check_algorithm(entry: str, where: str, *, trust: bool) -> None:
    """Raises InputError for an algorithm that is not ours, unless it is trusted. `entry`: module:Class."""
    if not trust and ":" in entry and not is_ours(entry):
        raise InputError(_refusal(where, [f"algorithm: {entry} ({module_file(entry)})"]))


def check_functions(graph: DataflowGraph, where: str, *, trust: bool) -> None:
    """Raises InputError for rewards of the graph that are not ours, unless they are trusted."""
    if trust:
        return
    names = dict.fromkeys(
        source.function for call in graph.calls for source in call.functions if source.function is not None
    )
    foreign = [f"reward: {name} ({module_file(name)})" for name in names if not is_ours(name)]
    if foreign:
        raise InputError(_refusal(where, foreign))


def module_file(entry: str) -> str:
    """The file that importing the module of `module:name` would run; nothing is imported to find it."""
    folders: Iterable[str] | None = None
    found = "not found"
    for part in entry.partition(":")[0].split("."):
        spec = PathFinder.find_spec(part, None if folders is None else list(folders))
        if spec is None:
            return "not found"
        found = str(spec.origin or "built in")
        folders = spec.submodule_search_locations or ()
    return found


def _refusal(where: str, entries: Iterable[str]) -> str:
    listed = "".join(f"\n  {entry}" for entry in entries)
    return (
        f"{where}: names code that does not come with realloc:{listed}\n"
        f"It would run with your rights. Look at it, and give --trust to let it run."
    )
