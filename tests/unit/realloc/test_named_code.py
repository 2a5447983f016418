"""Modules that a file names: whatever they raise is a message with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from realloc.errors import InputError
from realloc.named_code import import_named


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
