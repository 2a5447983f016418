"""Runs of `realloc` that a campaign of faults starts, watches and compares; small disks that fill up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

# imported before runs are forked, so that none of them has to
import runtime.launch  # noqa: F401
from realloc.cli import main
from runtime.checkpoint_files import checkpoints_folder, list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300.0
"""What a run may take before it counts as one that never ends."""
CLOCK = ("seconds", "tokens_per_s")
_POLL_S = 0.001
_DISK = "48m"


def wait(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


class Launcher:
    """A forked `realloc` command. Its output goes to a file, which is read while it grows."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.output = folder / f"{name}.txt"
        self.pid = os.fork()
        if self.pid == 0:
            self._become(folder, arguments)
        self.code: int | None = None

    def _become(self, folder: Path, arguments: Sequence[str]) -> None:
        code = 1
        try:
            os.setsid()
            handle = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            code = main(list(arguments))
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:  # noqa: BLE001 - the child must not return into the campaign
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    @property
    def has_ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def ranks(self) -> list[int]:
        """The ids of the ranks' processes, in the order of the ranks."""
        try:
            return sorted(child.pid for child in psutil.Process(self.pid).children())
        except psutil.NoSuchProcess:
            return []

    def end(self) -> None:
        """Ends everything that is left of it."""
        for pid in self.leftovers():
            os.kill(pid, signal.SIGKILL)
        if not self.has_ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def leftovers(self) -> list[int]:
        """Processes of its session that outlive it."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != self.pid and os.getsid(process.pid) == self.pid:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def wait(self) -> int | None:
        """Its exit code; None when it does not end in time."""
        wait(lambda: self.has_ended)
        return self.code


class Command(Launcher):
    """A command that is a launcher, started as a program of its own."""

    def __init__(self, folder: Path, name: str, command: Sequence[str]) -> None:
        self._command = command
        super().__init__(folder, name)

    def _become(self, folder: Path, arguments: Sequence[str]) -> None:
        os.setsid()
        handle = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execvp(self._command[0], list(self._command))


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[bool], None]]:
    """A small file system in a folder, and a function that fills it up, or makes room again."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)], check=True, capture_output=True
    )

    def fill(is_full: bool) -> None:
        path = folder / "filler"
        if not is_full:
            path.unlink()
            return
        with path.open("wb", buffering=0) as stream:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        stream.write(bytes(size))
                except OSError:
                    continue

    try:
        yield fill
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def state_of(out: Path) -> Mapping[str, Any]:
    """Everything that a run has computed: metrics, samples, the trained models, the last checkpoint."""
    last = list_checkpoints(checkpoints_folder(out))[-1]
    files = [*sorted((out / "models").rglob("*.safetensors")), *sorted(last.iterdir())]
    state: dict[str, Any] = {str(path.relative_to(out)): path.read_bytes() for path in files}
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = lines(out / name)
        state[name] = [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
    return state


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may still be growing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
