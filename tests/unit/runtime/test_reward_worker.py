"""A reward in a process of its own: every failure has a name, and none takes the rank with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from realloc.errors import RunError
from realloc.functions import Sample
from realloc.rewards import RewardSource
from runtime.reward_worker import Failure, RewardWorker

MODULE = "tests.unit.runtime.odd_rewards"


@contextmanager
def worker(function: str, **changes: Any) -> Iterator[RewardWorker]:
    made = RewardWorker(RewardSource(function, function=f"{MODULE}:{function}", **changes))
    try:
        yield made
    finally:
        made.close()


def samples(*responses: str) -> list[Sample]:
    return [
        Sample(10 + i, "p", text, True, {"answer": 1}, f"data.jsonl, line {i}")
        for i, text in enumerate(responses)
    ]


def ask(made: RewardWorker, asked: Sequence[Sample]) -> list[float | Failure]:
    made.post(asked)
    return made.take(asked, "rew_inf: iteration 4")


def test_numbers_come_back_whatever_is_printed() -> None:
    with worker("length", options=(("scale", 2.0),)) as made:
        assert ask(made, samples("a", "bcd")) == [2.0, 6.0]
        many = samples(*["x" * 1000] * 500)  # more than a pipe holds
        assert ask(made, many) == [2000.0] * 500
    with worker("array") as made:
        assert ask(made, samples("a", "bcd")) == [1.0, 3.0]
    with worker("scalars") as made:
        assert ask(made, samples("a", "b", "c")) == [1.0, 2.0, 3.0]


def test_where_memory_runs_out_no_rank_is_ended_before_a_reward() -> None:
    with worker("memory_rank") as made:
        assert ask(made, samples("a")) == [1000.0]


FAILURES = {
    "nan": "returned nan, expected a finite number",
    "infinite": "returned -inf, expected a finite number",
    "too_large": "returned 1000",
    "words": "returned 'good', expected a finite number",
    "raises": "raised ZeroDivisionError: division by zero",
    "exits": "raised SystemExit: 0",
    "dies": "ended its process (exit code 3)",
    "closes": "ended its process (exit code 1)",
    "hangs": "took longer than 1 s",
    "too_few": "returned 0 for 1 samples; it must return a list with one number for each",
}


@pytest.mark.parametrize("function", FAILURES)
def test_a_failure_names_the_sample_or_marks_it(function: str, capfd: pytest.CaptureFixture[str]) -> None:
    asked = samples("good", "bad", "good")
    with worker(function, time_limit_s=1, sample_time_limit_s=1) as made:
        with pytest.raises(RunError) as caught:
            ask(made, asked)
        message = str(caught.value)
        assert FAILURES[function] in message
        for part in ("rew_inf: iteration 4", function, "sample 11 (data.jsonl, line 1)", "'bad'"):
            assert part in message
    with worker(function, time_limit_s=1, sample_time_limit_s=1, on_failure="skip") as made:
        first, second, third = ask(made, asked)
        assert (first, third) == (1.0, 1.0)
        assert isinstance(second, Failure)
        assert FAILURES[function] in second.text
        assert f"{second.text} for sample 11 (data.jsonl, line 1)" in (told := capfd.readouterr().err)
        assert "1 of 3 samples are left out" in told
        assert ask(made, samples("good")) == [1.0], "it goes on"


def test_a_line_that_raises_is_told() -> None:
    with worker("raises") as made, pytest.raises(RunError, match=r"odd_rewards\.py, line \d+"):
        ask(made, samples("bad"))


def test_other_returns_and_failures_of_whole_batches() -> None:
    with worker("nothing") as made, pytest.raises(RunError, match="returned NoneType"):
        ask(made, samples("a"))
    with worker("asks") as made, pytest.raises(RunError, match="raised EOFError"):
        ask(made, samples("a"))
    with worker("only_together") as made, pytest.raises(RunError, match="though none of its samples does"):
        ask(made, samples("a", "b"))


def test_a_module_that_cannot_be_loaded() -> None:
    source = RewardSource("f", function="no_such_module:f")
    made = RewardWorker(source)
    with pytest.raises(
        RunError, match=r"reward f \(no_such_module:f\): cannot be loaded: ModuleNotFoundError"
    ):
        made.post(samples("a"))
    made.close()


def test_what_a_hanging_function_started_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    with worker("starts_another", time_limit_s=1.0) as made, pytest.raises(RunError, match="took longer"):
        ask(made, samples(str(note)))
    assert not any(_lives(int(pid)) for pid in note.read_text().split())


def test_a_hanging_function_dies_with_its_rank(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    code = (
        "from tests.unit.runtime.test_reward_worker import ask, samples, worker\n"
        "with worker('starts_another', time_limit_s=60) as made:\n"
        f"    ask(made, samples({str(note)!r}))\n"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline, "the function did not start"
        time.sleep(0.05)
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    function, left = map(int, note.read_text().split())
    while _lives(function):
        assert time.monotonic() < deadline, "the function outlives its rank"
        time.sleep(0.05)
    os.kill(left, signal.SIGKILL)


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
