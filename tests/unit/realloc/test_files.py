"""Strict reading: every wrong file ends in an InputError that says where and what to change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from realloc.errors import InputError
from realloc.files import Reader, dump_yaml, kind_of, nearest, read_file, read_yaml, resolve_path, write_text
from tests.unit.realloc.make import write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.yaml"


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2", "did not find expected"),
        ("a:\n\t- b", "line 2"),
        ("a: 1\nb: 2\na: 3", "line 3, not valid YAML: the key 'a' stands twice"),
        ("1: x\n'1': y", "the key '1' stands twice"),
        ("{[1]: x}", "keys must be plain words"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "line 3, not valid YAML: merge keys (<<) are not supported"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !secret 1", "could not determine a constructor"),
        ("a: !!bool maybe", "a tag (!!) does not fit"),
        ("a: !!timestamp soon", "a tag (!!) does not fit"),
        ("a: !!int ''", "a tag (!!) does not fit"),
        ("a: !!map [b]", "tagged as a mapping but is none"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 2026-99-99", "month must be in 1..12"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x00", "not valid YAML"),
        ("[" * 100_000, "nested more than 50 levels"),
        ("{a: " * 5000, "nested more than 50 levels"),
        ("- " * 5000, "nested more than 50 levels"),
    ],
)
def test_bad_yaml(file: Path, text: str, expected: str) -> None:
    found = message(read_yaml, write(file, text))
    assert found.startswith(f"{file}:")
    assert expected in found
    assert "\n" not in found


def test_unreadable_files(tmp_path: Path) -> None:
    assert message(read_yaml, tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file."
    assert "is a directory" in message(read_yaml, tmp_path)
    (tmp_path / "latin").write_bytes(b"a: \xff")
    assert "not UTF-8 text (byte 3)" in message(read_yaml, tmp_path / "latin")
    assert "cannot be read" in message(read_yaml, tmp_path / ("x" * 5000))
    assert "cannot be read" in message(read_yaml, "a\0b")


def test_a_message_does_not_unfold_shared_lists(file: Path) -> None:
    levels = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    content = read_yaml(write(file, "a0: &a0 [x]\n" + levels))
    assert len(message(Reader(content, "f").get, "a59", str)) < 200
    recursive = read_yaml(write(file, "&a {x: *a}"))
    assert len(message(Reader(recursive, "f").get, "x", str)) < 200
    # a header that is such a list
    text = "a0: &a0 [x]\n" + levels + "realloc: *a59\n"
    assert "expected text such as" in message(kind_of, write(file, text))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("a: 1", "the first line must say what the file is"),
        ("[1]", "the first line must say what the file is"),
        ("", "the first line must say what the file is"),
        ("realloc: plam/1", "unknown kind 'plam'. Did you mean 'plan'?"),
        ("realloc: plan", "lacks a version"),
        ("realloc: plan/²", "lacks a version"),
        ("realloc: plan/-1", "lacks a version"),
        ("realloc: 1", "expected text such as"),
    ],
)
def test_bad_header(file: Path, header: str, expected: str) -> None:
    assert expected in message(kind_of, write(file, header))


def test_header_of_another_kind_or_version(file: Path) -> None:
    write(file, "realloc: plan/1")
    assert kind_of(file) == "plan"
    assert "is a realloc plan file, expected a cluster file" in message(read_file, file, "cluster")
    write(file, "realloc: plan/2")
    assert "plan version 2; this realloc reads version 1" in message(read_file, file, "plan")


def reader(**content: Any) -> Reader:
    return Reader(content, "f.yaml")


def test_values_come_back_typed() -> None:
    r = reader(a="x", b=3, c=2, d=True, e="1e-4", f=None, g={"h": 1})
    assert r.get("a", str) == "x"
    assert r.integer("b") == 3
    assert r.number("c") == 2.0
    assert isinstance(r.number("c"), float)
    assert r.get("d", bool) is True
    assert r.number("e") == 1e-4
    assert r.optional_child("f") is None
    assert r.optional_child("absent") is None
    child = r.optional_child("g")
    assert child is not None
    assert child.where == "f.yaml: g"
    assert child.integer("h") == 1
    assert child.at("h") == "f.yaml: g.h"
    assert r.integer("absent", 5) == 5
    r.done()
    child.done()


@pytest.mark.parametrize(
    ("value", "method", "expected"),
    [
        (True, "integer", "expected a whole number, found True"),
        (1.5, "integer", "expected a whole number, found 1.5"),
        ("3", "integer", "expected a whole number, found '3'"),
        (None, "integer", "expected a whole number, found nothing"),
        (-1, "integer", "-1 is below the least allowed, 0"),
        (2**70, "integer", "too large"),
        (16**6000, "integer", "too large"),
        (16**6000, "number", "too large"),
        (10**400, "number", "too large"),
        (math.nan, "number", "nan is not a number to use"),
        (math.inf, "number", "inf is not a number to use"),
        (-math.inf, "number", "-inf is not a number to use"),
        ("inf", "number", "inf is not a number to use"),
        (False, "number", "expected a number, found False"),
        ("abc", "number", "expected a number, found 'abc'"),
        ([1], "number", "expected a number, found [1]"),
        ([16**6000], "number", "expected a number, found [a number of 24001 bits]"),
    ],
    ids=lambda value: None if isinstance(value, str) else "value",  # Python refuses to print huge numbers
)
def test_wrong_values(value: Any, method: str, expected: str) -> None:
    found = message(getattr(reader(key=value), method), "key")
    assert found.startswith("f.yaml: key: ")
    assert expected in found
    assert len(found) < 200


@pytest.mark.parametrize("value", ["a\0b", "a\ud800b", 7, None, True, ["x"], {"x": 1}])
def test_wrong_texts(value: Any) -> None:
    assert message(reader(key=value).get, "key", str).startswith("f.yaml: key: ")


def test_bounds_choices_and_absent_keys() -> None:
    assert "11 is above the most allowed, 10" in message(reader(k=11).integer, "k", maximum=10)
    assert "0.0 is below the least allowed, 0.5" in message(reader(k=0).number, "k", minimum=0.5)
    assert "'bfloat' is not known. Did you mean 'bfloat16'?" in message(
        reader(k="bfloat").choice, "k", ("float32", "bfloat16")
    )
    assert "the key 'k' is missing (expected a whole number)" in message(reader().integer, "k")
    assert "the key 'k' is missing" in message(reader().raw, "k")
    assert "expected a mapping of keys, found [1]" in message(reader(k=[1]).child, "k")


def test_unknown_keys_name_the_nearest() -> None:
    r = reader(sequences=1, promt_tokens=2)
    r.integer("sequences")
    r.optional_child("data")
    r.integer("prompt_tokens", 1)
    assert message(r.done) == "f.yaml: unknown key 'promt_tokens'. Did you mean 'prompt_tokens'?"
    r = reader(datta={})
    assert r.optional_child("data") is None
    assert message(r.done) == "f.yaml: unknown key 'datta'. Did you mean 'data'?"
    r = reader(zzz=1)
    r.integer("first", 1)
    r.integer("second", 1)
    assert message(r.done) == "f.yaml: unknown key 'zzz'. Known: first, second."


def test_nearest() -> None:
    assert nearest("actr", ["actor", "critic"]) == " Did you mean 'actor'?"
    assert (
        nearest("gpus", ["nodes", "gpus_per_node", "gpus_per_node_and_more"])
        == " Did you mean 'gpus_per_node'?"
    )
    assert nearest("h100", ["h200", "h100-sxm"]) == " Did you mean 'h100-sxm'?"
    assert nearest("learning_rates", ["seed", "learning_rate"]) == " Did you mean 'learning_rate'?"
    assert nearest("qqqq", ["b", "a"]) == " Known: a, b."
    assert nearest("qqqq", []) == ""


def test_paths(tmp_path: Path) -> None:
    assert resolve_path("a/../b", tmp_path, "w") == tmp_path.resolve() / "b"
    assert resolve_path("/x/y", tmp_path, "w") == Path("/x/y")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for bad in ("x" * 5000, "a\0b", "~no-such-user-here/x", "loop/x"):
        assert message(resolve_path, bad, tmp_path, "w").startswith("w: ")


def test_written_text_is_read_back(file: Path) -> None:
    content = {"text": "1e5", "small": 1e-5, "list": [1, 2], "map": {"a": None, "b": {"c": True}}, "é": "ü"}
    write_text(file, dump_yaml("plan", content))
    assert read_yaml(file) == {"realloc": "plan/1", **content}
    assert file.read_text(encoding="utf-8").startswith("realloc: plan/1\n")
    assert list(file.parent.iterdir()) == [file]


def test_unwritable_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file" / "below", tmp_path):
        assert "cannot be written" in message(write_text, bad, "text")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
