"""What is shown of a run: lines, JSON lines, a terminal, and the time left."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from runtime.display import JsonLines, Lines, Moment, Terminal, duration, most_memory, time_left
from tests.run.workplace import Workplace

MOMENT = Moment(
    iteration=2,
    iterations=5,
    seconds=4.0,
    tokens_per_s=1234.5,
    headline="reward 0.500  kl 0.0100",
    metrics={"rew_inf/scores": 0.5},
    predicted_s=3.5,
    left_s=8.0,
    memory_bytes=3 << 29,
)


def test_a_line_has_everything() -> None:
    stream = io.StringIO()
    Lines(Console(file=stream, width=40, highlight=False)).show(MOMENT)
    assert stream.getvalue() == (
        "iteration 3/5  reward 0.500  kl 0.0100  "
        "1,234 tokens/s  4.00 s (3.50 s predicted)  1.50 GiB  0:08 left\n"
    )


def test_json_lines() -> None:
    stream = io.StringIO()
    display = JsonLines(stream)
    display.show(MOMENT)
    display.warn("so and so")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["event"] == "iteration"
    assert (first["iteration"], first["metrics"]["rew_inf/scores"], first["left_s"]) == (2, 0.5, 8.0)
    assert second == {"event": "warning", "message": "so and so"}


@pytest.mark.parametrize("width", [200, 60])
def test_a_terminal_shows_the_numbers_and_gives_the_screen_back(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, highlight=False, color_system=None)
    display = Terminal(console, 0, 5)
    display.begin()
    display.show(MOMENT)
    display.warn("a warning")
    display.end()
    text = stream.getvalue()
    assert "3/5" in text
    assert "reward 0.500" in text
    assert "warning: a warning" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again


def test_the_time_left() -> None:
    assert time_left([60.0], 3) == 180.0
    assert time_left([60.0, 2.0, 2.0, 4.0], 10) == 20.0
    assert time_left([9.0, *[50.0] * 20, *[1.0] * 8], 10) == 10.0
    assert time_left([1.0, 2.0], 0) == 0.0
    assert [duration(s) for s in (0.4, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_memory_of_nobody() -> None:
    found = most_memory()
    assert found is None or found >= 0


def test_json_on_standard_output_alone(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    plan = place.plan("plan")
    code, out, err = place.run("run", plan.name, "--out", "o", "--log-format", "json")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["iteration"] for e in events if e["event"] == "iteration"] == [0, 1]
    assert all(e["memory_bytes"] > 1 << 20 for e in events if e["event"] == "iteration")
    assert "trained models" in err
