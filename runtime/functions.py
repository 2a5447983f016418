"""Loads the functions that a graph names: the algorithm's own, and `module:function` of a user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from realloc.dataflow import DataflowGraph
from realloc.errors import InputError
from realloc.functions import LossFunction, PrepareFunction, ReportFunction, SelectFunction
from realloc.named_code import import_named


@dataclass(frozen=True)
class FunctionTable:
    """Functions by the names that calls use. `module` is the algorithm's functions module."""

    module: str

    def loss(self, name: str) -> LossFunction:
        function: LossFunction = self._load(name)
        return function

    def prepare(self, name: str) -> PrepareFunction:
        function: PrepareFunction = self._load(name)
        return function

    def select(self, name: str) -> SelectFunction:
        function: SelectFunction = self._load(name)
        return function

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
