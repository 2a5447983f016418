"""The folder of a run: made empty, taken by one run at a time, taken back to a checkpoint.

Knows the files that a run leaves; knows nothing of how it runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from realloc.errors import InputError
from realloc.files import write_text
from runtime.checkpoint_files import (
    checkpoints_folder,
    iteration_of,
    list_checkpoints,
    remove_checkpoint,
    remove_partial,
)

LOCK = ".lock"
LOCK_WAIT_S = 5.0
"""How long the ranks of a launcher that was killed may take to follow it."""
ERROR_BYTES = 8192
_SCRATCH = ("trace", "errors")


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Makes an empty output folder. Raises InputError when there is something in it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder for the run's output.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(
                f"{out}: is not empty; give another --out, --resume {out} to continue the run in it, "
                f"or --overwrite to delete what is there."
            )
        if not (out / "plan.yaml").exists():
            raise InputError(f"{out}: holds no run of realloc, so --overwrite will not delete it.")
        with run_lock(out):
            shutil.rmtree(out)
    _make(out)


def rewind_folder(out: Path, iteration: int) -> None:
    """Drops what a run has written beyond its first `iteration` iterations, so that it can go on.

    Checkpoints and metrics of later iterations go, since they are of another course of the run; an
    earlier trace is kept as `trace-before-ITERATION.jsonl`, for its clock is not the new one's.
    Raises InputError when a file cannot be written.
    """
    remove_partial(checkpoints_folder(out))
    for checkpoint in list_checkpoints(checkpoints_folder(out)):
        if iteration_of(checkpoint) > iteration:
            remove_checkpoint(checkpoint)
    for written in (out / "metrics.jsonl", out / "samples.jsonl"):
        if written.exists():
            lines = written.read_text(encoding="utf-8", errors="replace").split("\n")
            write_text(written, "".join(f"{line}\n" for line in lines if _iteration(line) < iteration))
    if (out / "trace.jsonl").exists():
        (out / "trace.jsonl").replace(out / f"trace-before-{iteration}.jsonl")
    for name in _SCRATCH:
        shutil.rmtree(out / name, ignore_errors=True)
    _make(out)


def reserve_errors(out: Path, world_size: int) -> None:
    """Makes room for what each rank may have to say as it dies, so that a full disk can be reported."""
    for rank in range(world_size):
        write_text(out / "errors" / f"rank-{rank}.json", " " * ERROR_BYTES)


def _iteration(line: str) -> float:
    """The iteration of a line of metrics; infinite for a line that a kill has cut short."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _make(out: Path) -> None:
    try:
        for name in (*_SCRATCH, "logs", "checkpoints"):
            (out / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}.") from None


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Keeps other runs out of the folder. Raises InputError when one is still in it.

    The ranks inherit the lock, so a folder stays taken as long as any of them lives.
    """
    try:
        handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to: {error.strerror}.") from None
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise InputError(
                    f"{out}: another run is still at work in this folder; wait for it or end it."
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
