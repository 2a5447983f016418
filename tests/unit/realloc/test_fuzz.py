"""Random damage to valid files: reading succeeds or ends in a ReallocError, never in anything else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import realloc.plan
from realloc.cluster import read_cluster
from realloc.errors import ReallocError
from realloc.experiment import experiment_content, parse_experiment, read_experiment
from realloc.files import Reader, dump_yaml
from realloc.plan import plan_text, read_plan
from realloc.trace import TraceRecord, read_trace, trace_lines
from tests.unit.realloc.make import experiment_mapping, plan_mapping

Path_ = tuple[Any, ...]

WORDS = st.sampled_from(
    [
        *(
            "",
            "ppo",
            "sft",
            "PPO",
            ":",
            "a:b",
            "os:getcwd",
            "llama-7b",
            "pythia-14m",
            "/",
            "..",
            "~",
            "~x/y",
            "a\0b",
        ),
        *(
            "node[0-1]",
            "node0:gpu[0-3]",
            "node[9]",
            "d4t4p1",
            "d0t0p0",
            "d16t1p1m99",
            "float32",
            "1e-4",
            "nan",
        ),
        *("inf", "-inf", "x" * 5000, "é", "\u2028", "actor_gen", "actor", "experiment/1", "plan/1", "null"),
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 16**200]),
    st.floats(),  # with NaN and the infinities
    WORDS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(content: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Where every value of a nested mapping is."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


def damaged(valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The mapping with up to three values replaced, removed, renamed or moved."""
    everywhere = sorted(places(valid), key=repr)
    change = st.tuples(
        st.sampled_from(everywhere),
        st.sampled_from(["replace", "remove", "rename", "copy"]),
        VALUES,
        WORDS,
        st.sampled_from(everywhere),
    )
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _apply(valid, changes))


def _apply(valid: dict[str, Any], changes: list[tuple[Path_, str, Any, str, Path_]]) -> dict[str, Any]:
    content = copy.deepcopy(valid)
    for at, what, value, word, other in changes:
        parent, copied = _follow(content, at[:-1]), _follow(content, other)
        if not isinstance(parent, dict) or at[-1] not in parent:
            continue  # an earlier change took it away
        if what == "replace":
            parent[at[-1]] = value
        elif what == "remove":
            del parent[at[-1]]
        elif what == "rename":
            parent[word] = parent.pop(at[-1])
        else:
            parent[at[-1]] = copy.deepcopy(copied)
    return content


def _follow(content: Any, at: Path_) -> Any:
    for key in at:
        if not isinstance(content, dict) or key not in content:
            return None
        content = content[key]
    return content


def survives(read: Callable[[Path], Any], path: Path, content: Any) -> Any:
    """What reading gives; None where it ended in a message."""
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        return read(path)
    except ReallocError as error:
        message = str(error)
    assert 0 < len(message) < 20_000
    return None


@FUZZ
@given(damaged(experiment_mapping()))
def test_damaged_experiments(tmp_path: Path, content: dict[str, Any]) -> None:
    found = survives(read_experiment, tmp_path / "e.yaml", content)
    if found is not None:
        again = survives(
            read_experiment, tmp_path / "e.yaml", dump_yaml("experiment", experiment_content(found))
        )
        assert again == found


@FUZZ
@given(damaged(plan_mapping()))
def test_damaged_plans(tmp_path: Path, content: dict[str, Any]) -> None:
    found = survives(read_plan, tmp_path / "p.yaml", content)
    if found is not None:
        found.augmented.check_order(found.node_order, "plan")
        again = survives(read_plan, tmp_path / "p.yaml", plan_text(found))
        assert again is not None
        assert again.placements == found.placements
        assert again.experiment == found.experiment


NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        0.5,
        2**63,
        10**30,
        10**400,
        16**6000,
        float("nan"),
        float("inf"),
        -float("inf"),
    ),
    *(
        "",
        "a",
        "a\0b",
        "\ud800",
        "x" * 5000,
        "~x/y",
        "a:b",
        ":",
        "node[0-1]",
        "d1t1p1",
        "1e999",
        "node0:gpu[0-0]",
    ),
    *([], [None], {}, {"a": 1}, {"mean": 1, "max": 10**9}, {"dp": 2**62}, {1: 2}, {"path": "\0"}),
)


def swept(valid: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The mapping with each value replaced by each nasty one."""
    for at in places(valid):
        content = copy.deepcopy(valid)
        parent = _follow(content, at[:-1])
        for value in NASTY:
            parent[at[-1]] = value
            yield content


def test_every_value_of_an_experiment(tmp_path: Path) -> None:
    valid = experiment_mapping()
    del valid["realloc"]
    fine = 0
    for content in swept(valid):
        try:
            parse_experiment(Reader(content, "e"), tmp_path)
            fine += 1
        except ReallocError as error:
            message = str(error)
            assert message.startswith(("e: ", "experiment: ", f"{tmp_path}: ")), message
            assert len(message) < 20_000
    assert fine > 20  # such as a seed of 0


def test_every_value_of_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plan's own part, without the detour through text."""
    valid = plan_mapping()
    experiment = valid.pop("experiment")
    fine = 0
    for content in swept(valid):
        reader = Reader({**content, "experiment": experiment}, "p.yaml")
        reader.raw("realloc", None)
        monkeypatch.setattr(realloc.plan, "read_file", lambda path, kind, reader=reader: reader)
        try:
            read_plan(tmp_path / "p.yaml")
            fine += 1
        except ReallocError as error:
            message = str(error)
            assert "p.yaml" in message or message.startswith("plan")
            assert len(message) < 20_000
    assert fine > 20


@FUZZ
@given(VALUES)
def test_any_value_for_a_cluster(tmp_path: Path, value: Any) -> None:
    survives(
        read_cluster, tmp_path / "c.yaml", {"realloc": "cluster/1", "gpus_per_node": value, "device": "x"}
    )
    survives(read_cluster, tmp_path / "c.yaml", {"realloc": "cluster/1", "gpus_per_node": 1, "device": value})
    survives(read_cluster, tmp_path / "c.yaml", value)


PLAN_TEXT = yaml.safe_dump(plan_mapping(), sort_keys=False)
TRACE_TEXT = "\n".join(trace_lines(2, [TraceRecord(i, 0, "gen", "call", 0.0, 1.0) for i in range(3)]))
PIECES = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\t",
        ":",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
        "!!int ",
        "!!map ",
        "<<: ",
        "? ",
        "|",
        "'",
        '"',
    ]
)


@pytest.mark.parametrize(("read", "text"), [(read_plan, PLAN_TEXT), (read_trace, TRACE_TEXT)])
@FUZZ
@given(data=st.data())
def test_damaged_text(tmp_path: Path, data: st.DataObject, read: Callable[[Path], Any], text: str) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = start + data.draw(st.integers(0, 20))
        text = text[:start] + data.draw(PIECES | st.characters()) + text[stop:]
    survives(read, tmp_path / "file", text)
