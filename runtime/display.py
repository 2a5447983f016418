"""What a run shows while it goes on: a live view on a terminal, a line an iteration elsewhere, or JSON lines.

Decides how progress looks and what the time left is; knows no stores and writes no files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, TextIO

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from runtime.nvml import find_gpus

AUTO, TEXT, JSON = "auto", "text", "json"
FORMATS = (AUTO, TEXT, JSON)
RECENT = 8
"""Iterations that the time left is estimated from."""


@dataclass(frozen=True)
class Moment:
    """One finished iteration, counted from 0. `headline`: scores, KL and losses in words."""

    iteration: int
    iterations: int
    seconds: float
    tokens_per_s: float
    headline: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    predicted_s: float | None = None
    left_s: float | None = None
    memory_bytes: int | None = None


class Display(Protocol):
    """Where a run shows itself. `begin` before the first moment, `end` after the last."""

    def begin(self) -> None: ...
    def show(self, moment: Moment) -> None: ...
    def warn(self, message: str) -> None: ...
    def end(self) -> None: ...


def open_display(form: str, first: int, iterations: int) -> Display:
    """The display of that format for a run that goes on after `first` iterations."""
    if form == JSON:
        # what is said to people goes to where the command line has sent it
        return JsonLines(sys.__stdout__ or sys.stdout)
    if form == AUTO and sys.stdout.isatty():
        return Terminal(Console(highlight=False), first, iterations)
    return Lines(Console(highlight=False))


class JsonLines:
    """One JSON object a line: `event` is `iteration` or `warning`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def begin(self) -> None:
        pass

    def show(self, moment: Moment) -> None:
        self._write({"event": "iteration", **{k: v for k, v in vars(moment).items() if k != "headline"}})

    def warn(self, message: str) -> None:
        self._write({"event": "warning", "message": message})

    def end(self) -> None:
        pass

    def _write(self, event: Mapping[str, object]) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


class Lines:
    """One plain line an iteration, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self) -> None:
        pass

    def show(self, moment: Moment) -> None:
        title = f"iteration {moment.iteration + 1}/{moment.iterations}"
        self._console.print(f"{title}  {moment.headline}  {measures(moment)}", soft_wrap=True)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", soft_wrap=True)

    def end(self) -> None:
        pass


class Terminal:
    """A few lines that change in place: a bar, what it takes, and what is learned; narrow ones are folded."""

    def __init__(self, console: Console, first: int, iterations: int) -> None:
        self._bar = Progress(
            TextColumn("iteration"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task = self._bar.add_task("run", total=iterations, completed=first, left="starting")
        self._headline = Text("", overflow="fold")
        self._live = Live(Group(self._bar, self._headline), console=console, refresh_per_second=4)

    def begin(self) -> None:
        self._live.start()

    def show(self, moment: Moment) -> None:
        self._bar.update(self._task, completed=moment.iteration + 1, left="")
        self._headline.plain = f"{moment.headline}\n{measures(moment)}"
        self._live.refresh()

    def warn(self, message: str) -> None:
        self._live.console.print(f"warning: {message}", soft_wrap=True)

    def end(self) -> None:
        self._live.stop()


def measures(moment: Moment) -> str:
    """Speed, predicted and measured seconds, memory and the time left, in one line."""
    parts = [f"{moment.tokens_per_s:,.0f} tokens/s", f"{moment.seconds:.2f} s"]
    if moment.predicted_s is not None:
        parts[-1] += f" ({moment.predicted_s:.2f} s predicted)"
    if moment.memory_bytes is not None:
        parts.append(f"{moment.memory_bytes / 2**30:.2f} GiB")
    if moment.left_s:
        parts.append(f"{duration(moment.left_s)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_left(seconds: list[float], remaining: int) -> float:
    """Seconds that the remaining iterations take, by the last ones; the first one, which warms up, counts
    only where there is no other."""
    return remaining * median((seconds[1:] or seconds)[-RECENT:])


def most_memory() -> int | None:
    """Bytes in use on this node's fullest GPU; without GPUs, of the largest of this process's children.

    On a host, memory that ranks share is counted for each. None when there is nobody to ask.
    """
    gpus = find_gpus()
    if gpus is not None and gpus.free_bytes:
        return max(total - free for total, free in zip(gpus.memory_bytes, gpus.free_bytes, strict=True))
    found = []
    for child in psutil.Process().children():
        try:
            found.append(int(child.memory_info().rss))
        except psutil.Error:  # it has just ended
            continue
    return max(found, default=None)
