"""Loads the functions that a graph names: the algorithm's own, and `module:function` of a user.

What an algorithm's functions return is held to their contracts (`realloc.functions`), so that a mistake in
one is told as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from realloc.dataflow import DataflowGraph
from realloc.errors import InputError, RunError
from realloc.functions import Batch, LossFunction, PrepareFunction, ReportFunction, SelectFunction
from realloc.named_code import import_named


@dataclass(frozen=True)
class FunctionTable:
    """Functions by the names that calls use. `module` is the algorithm's functions module."""

    module: str

    def loss(self, name: str) -> LossFunction:
        """Raises RunError where the function returns no scalar and metrics."""
        function: LossFunction = self._load(name)

        def checked(output: Any, batch: Batch, hyperparameters: Mapping[str, Any]) -> tuple[Any, Any]:
            answer = function(output, batch, hyperparameters)
            if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)):
                raise self._broken(name, f"{_kind(answer)} instead of a loss and a mapping of metrics")
            for what, value in (("the loss", answer[0]), *answer[1].items()):
                is_scalar = isinstance(value, torch.Tensor) and value.numel() == 1
                if not (is_scalar or (what in answer[1] and isinstance(value, (int, float)))):
                    raise self._broken(name, f"{_kind(value)} for {what}, which has to be a scalar tensor")
            return answer

        return checked

    def prepare(self, name: str, keys: Sequence[str]) -> PrepareFunction:
        """Raises RunError where the function does not return a tensor for each of the keys."""
        function: PrepareFunction = self._load(name)

        def checked(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Any]:
            answer = function(batch, hyperparameters)
            if not isinstance(answer, Mapping):
                raise self._broken(name, f"{_kind(answer)} instead of a mapping of {', '.join(keys)}")
            for key in keys:
                if not isinstance(answer.get(key), torch.Tensor):
                    found = "nothing" if key not in answer else _kind(answer[key])
                    raise self._broken(name, f"{found} for '{key}', which has to be a tensor")
            return answer

        return checked

    def select(self, name: str) -> SelectFunction:
        """Raises RunError where the function does not return one element for each sequence."""
        function: SelectFunction = self._load(name)

        def checked(batch: Batch, hyperparameters: Mapping[str, Any]) -> Any:
            answer = function(batch, hyperparameters)
            if not (isinstance(answer, torch.Tensor) and answer.shape == (batch.num_sequences,)):
                raise self._broken(name, f"{_kind(answer)} for a batch of {batch.num_sequences} sequences")
            return answer

        return checked

    def report(self, name: str) -> ReportFunction:
        function: ReportFunction = self._load(name)
        return function

    def check(self, graph: DataflowGraph) -> None:
        """Loads every function the graph names. Raises InputError for one that is not there."""
        for call in graph.calls:
            rewards = (source.function for source in call.functions)
            mixed = None if call.mixture is None else call.mixture.loss
            for name in (call.select, call.prepare, call.loss, mixed, call.report, *rewards):
                if name is not None:
                    self._load(name)

    def _broken(self, name: str, what: str) -> RunError:
        where = name if ":" in name else f"{self.module}:{name}"
        return RunError(f"{where} returned {what}.")

    def _load(self, name: str) -> Callable[..., Any]:
        module_name, colon, attribute = name.rpartition(":")
        if not colon:
            module_name = self.module
        module = import_named(module_name, f"function '{name}'")
        function = getattr(module, attribute, None)
        if not callable(function):
            raise InputError(f"function '{name}': module '{module_name}' has no such function.")
        result: Callable[..., Any] = function
        return result


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return type(value).__name__
