"""Modules and algorithms that a file names: whatever they raise is a message with the line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from realloc.errors import InputError
from realloc.experiment import parse_experiment
from realloc.files import Reader
from realloc.named_code import import_named
from tests.unit.realloc.make import experiment_mapping


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_thing", "No module named 'no_such_thing'"),
        ("from math import nothing", r"ImportError: cannot import name 'nothing' .*flawed\d\.py, line 1"),
        ("x = 1\ny = x / 0", r"ZeroDivisionError: division by zero \(.*flawed\d\.py, line 2\)"),
        ("def f(:\n", r"SyntaxError: .*flawed\d\.py, line 1"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_fails_is_a_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    message: str,
) -> None:
    name = f"flawed{len(source) % 10}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=f"^here: cannot import '{name}': {message}"):
        import_named(name, "here")


@pytest.mark.parametrize(
    ("made", "read", "drawn", "message"),
    [
        ("pass", "return {}", "return 1", r"flawed:A\.graph returned int, expected DataflowGraph"),
        ("pass", "return {}", "return 1 / 0", r"A\.graph raised ZeroDivisionError: .*flawed\.py, line 8\)"),
        ("pass", "pass", "", r"A\.hyperparameters returned NoneType, expected Mapping"),
        (
            "pass",
            "raise KeyError('x')",
            "",
            r"A\.hyperparameters raised KeyError: 'x' \(.*flawed\.py, line 6\)",
        ),
        ("{}['x']", "return {}", "", r"flawed:A: it raised KeyError: 'x' \(.*flawed\.py, line 4\)"),
    ],
)
def test_an_algorithm_that_fails_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, read: str, drawn: str, message: str
) -> None:
    source = (
        f"class A:\n    name, functions = 'a', 'b'\n    def __init__(self):\n        {made}\n"
        f"    def hyperparameters(self, reader):\n        {read}\n"
        f"    def graph(self, experiment):\n        {drawn or 'pass'}\n"
    )
    (tmp_path / "flawed.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flawed", raising=False)
    content = {k: v for k, v in experiment_mapping().items() if k not in ("realloc", "hyperparameters")}
    content["algorithm"] = "flawed:A"
    with pytest.raises(InputError, match=message):
        parse_experiment(Reader(content, "experiment"), tmp_path)
    sys.modules.pop("flawed", None)
