"""Commands on damaged files, for some seconds; `benchmarks/fuzz.py` does it for longer."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from benchmarks.fuzz import fuzz
from tests.fuzz.cases import COMMANDS, Outcome, Watch, run_command, write_originals
from tests.fuzz.mutations import BOMB, damaged


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_originals(folder)
    return folder


def run(originals: Path, folder: Path, watch: Watch, command: tuple[str, ...], content: bytes) -> Outcome:
    return run_command(originals, folder, watch, command, "experiment.yaml", content)


def test_what_is_not_damaged_is_accepted(originals: Path, tmp_path: Path, watch: Watch) -> None:
    """Otherwise the damage would be tried on commands that end before they read it."""
    for name, commands in COMMANDS.items():
        for command in dict.fromkeys(commands):
            outcome = run_command(
                originals, tmp_path / "c", watch, command, name, (originals / name).read_bytes()
            )
            if command[:2] != ("run", "--resume"):  # the run has no checkpoint
                assert outcome.kind == "accepted", outcome


def test_the_watch_sees_what_it_must(originals: Path, tmp_path: Path, watch: Watch) -> None:
    content = (originals / "experiment.yaml").read_bytes()
    outside = ("search", "experiment.yaml", "-o", "../outside.yaml", "--time-limit", "0.1")
    assert run(originals, tmp_path / "c", watch, outside, content).kind == "write"
    assert run(originals, tmp_path / "c", watch, ("check", "nothing.yaml"), content).kind == "refused"
    watch.heard.clear()
    watch.allowed = tmp_path
    try:
        os.system("true")
    finally:
        watch.allowed = None
    assert watch.heard


def test_a_bomb_is_refused_at_once(originals: Path, tmp_path: Path, watch: Watch) -> None:
    for text in (BOMB, "a: " + "[" * 100_000, "realloc: experiment/1\nalgorithm: " + "x" * 10_000_000):
        assert (
            run(originals, tmp_path / "c", watch, ("check", "experiment.yaml"), text.encode()).kind
            == "refused"
        )


def test_damage_depends_on_the_seed_alone() -> None:
    content = b"a: {b: 1, c: [2, 3]}\nd: x\n"
    assert [damaged(content, Random(n)) for n in range(50)] == [
        damaged(content, Random(n)) for n in range(50)
    ]
    assert len({damaged(content, Random(n)) for n in range(50)}) > 30


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    outcomes = fuzz(400, seed=1_000_000, seconds=15.0)
    wrong = [(seed, outcome) for seed, outcome in outcomes if outcome.is_wrong]
    assert not wrong, wrong[0]
    assert len(outcomes) >= 50
    assert {outcome.kind for _, outcome in outcomes} == {"accepted", "refused"}
