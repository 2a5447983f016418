"""What an RLHF algorithm is to the rest of realloc: a dataflow graph and a module of functions.

An algorithm knows nothing of meshes and strategies. Its tensor functions live in a module of
their own that only `runtime` loads, so that planning never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from realloc.dataflow import DataflowGraph
from realloc.errors import InputError, ReallocError
from realloc.files import Reader, nearest
from realloc.named_code import described, import_named

if TYPE_CHECKING:
    from realloc.experiment import Experiment

BUILT_IN: Mapping[str, str] = {
    "ppo": "experiments.ppo:PPO",
    "grpo": "experiments.grpo:GRPO",
    "rloo": "experiments.rloo:RLOO",
    "remax": "experiments.remax:ReMax",
    "reinforce_pp": "experiments.reinforce_pp:ReinforcePP",
    "raft": "experiments.raft:RAFT",
    "dpo": "experiments.dpo:DPO",
    "iterative_dpo": "experiments.iterative_dpo:IterativeDPO",
    "sft": "experiments.sft:SFT",
    "reward": "experiments.reward:Reward",
}

_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Algorithm(Protocol):
    """Builds the graph of an experiment. Implementations are stateless."""

    name: str
    functions: str
    """Dotted name of the module that holds the functions the graph's calls name."""

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError."""

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """The calls of one iteration. Raises InputError when the experiment lacks something."""


def resolve(name: str, where: str) -> Algorithm:
    """The algorithm of that name: a built-in one, or `my_module:MyAlgorithm`.

    Raises InputError when it is unknown or cannot be imported.
    """
    entry = BUILT_IN.get(name, name)
    module_name, _, attribute = entry.partition(":")
    if not _ENTRY.fullmatch(entry):
        raise InputError(
            f"{where}: algorithm '{name}' is not known (or write your own as module:Class)."
            f"{nearest(name, BUILT_IN)}"
        )
    module = import_named(module_name, where)
    if not hasattr(module, attribute):
        raise InputError(f"{where}: module '{module_name}' has no '{attribute}'.")
    found = getattr(module, attribute)
    # a plan may come from elsewhere: call nothing that does not look like an algorithm
    needed = ("name", "functions", "hyperparameters", "graph")
    missing = [part for part in needed if not hasattr(found, part)]
    if missing or not isinstance(found, type):
        lacks = f"it lacks '{missing[0]}'" if missing else "it is no class"
        raise InputError(f"{where}: '{entry}' is not an algorithm: {lacks}.")
    if entry in BUILT_IN.values():
        algorithm: Algorithm = found()
        return algorithm
    made: Algorithm = _answer(f"{where}: {entry}: it", found, found)
    return _Users(made, f"{where}: {entry}")


class _Users:
    """An algorithm of a user's own: whatever it raises, or returns instead of an answer, is a message."""

    def __init__(self, made: Algorithm, where: str) -> None:
        self.name, self.functions = made.name, made.functions
        self._made, self._where = made, where

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        where = f"{self._where}.hyperparameters"
        found: Mapping[str, Any] = _answer(where, Mapping, lambda: self._made.hyperparameters(reader))
        return found

    def graph(self, experiment: Experiment) -> DataflowGraph:
        where = f"{self._where}.graph"
        found: DataflowGraph = _answer(where, DataflowGraph, lambda: self._made.graph(experiment))
        return found


def _answer(where: str, kind: type, ask: Callable[[], Any]) -> Any:
    """What somebody's code answers. Raises InputError, which names the line, where it does not."""
    try:
        answer = ask()
    except ReallocError:
        raise
    except Exception as error:  # noqa: BLE001 (a class of others may raise anything)
        raise InputError(f"{where} raised {described(error, __file__)}.") from None
    if not isinstance(answer, kind):
        raise InputError(f"{where} returned {type(answer).__name__}, expected {kind.__name__}.")
    return answer
