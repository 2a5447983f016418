"""How far `realloc profile` is: a bar on stderr, where that is a terminal."""

from __future__ import annotations

import json
import subprocess
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Says what is being measured; nothing unless stderr is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def follow(self, process: subprocess.Popen[str]) -> str | None:
        """Shows what a process says on its stdout until it ends; returns its error, if it has one."""
        failure = None
        assert process.stdout is not None
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue  # a library's own chatter
            failure = said.get("error", failure)
            if "done" in said:
                self._bar.update(
                    self._task, description=said["what"], completed=said["done"], total=said["total"]
                )
        return failure
