"""Runs a test on several ranks: forked processes that talk over gloo on loopback.

Decides how ranks start, how their failures are told apart, and that nobody outlives the call. Knows
nothing of what the ranks do. The parent imports torch once and forks, so four ranks are up in well
under a second. Rendezvous is a file: no ports, nothing to collide with.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
import torch.distributed as dist

GRACE_S = 1.0
"""How long the other ranks may still report after the first failure."""
NOTICE_S = 0.25
"""A death by signal is seen by the parent up to this much later than by the rank's peers."""
GROUP_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1


class RankFailure(AssertionError):
    """A rank failed. `rank` is the first that did, `error` the name of what it raised or of the signal."""

    def __init__(self, rank: int, error: str, text: str) -> None:
        super().__init__(text)
        self.rank = rank
        self.error = error


class RankTimeout(AssertionError):
    """Some ranks had not finished in time; the message shows where they stood."""


@dataclass(frozen=True)
class _Failure:
    time_s: float
    rank: int
    error: str
    text: str


@dataclass(frozen=True)
class _Done:
    value: Any


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on every rank; returns the results in rank order.

    Results cross a pipe: plain numbers, lists, dicts and numpy arrays (turn tensors into numpy).
    Raises RankFailure with the traceback of the earliest failing rank, RankTimeout after
    `timeout_s`. All processes are gone when this returns or raises.
    """
    context = get_context("fork")
    torch.set_num_threads(1)  # before the fork: a child cannot use the parent's thread pool
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: list[ForkProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                pipes.append(ours)
                process = context.Process(
                    target=_rank_main,
                    args=(fn, rank, world_size, args, Path(folder), theirs, timeout_s, os.getpid()),
                    name=f"rank-{rank}",
                    daemon=True,
                )
                process.start()
                processes.append(process)
                theirs.close()
            return _collect(processes, pipes, Path(folder), timeout_s)
        finally:
            _end(processes, pipes)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: Sequence[Any],
    folder: Path,
    pipe: Connection,
    timeout_s: float,
    parent: int,
) -> None:
    _die_with(parent)
    stack = open(_stack_file(folder, rank), "w")  # noqa: SIM115 (open until the process is killed)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    message: _Failure | _Done
    try:
        store = dist.FileStore(str(folder / "rendezvous"), world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=min(timeout_s, GROUP_TIMEOUT_S)),
        )
        message = _Done(fn(rank, world_size, *args))
    except BaseException as error:  # whatever ends a rank, the parent reports it
        message = _Failure(time.monotonic(), rank, type(error).__name__, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        pipe.send(message)
    except (TypeError, AttributeError, PicklingError) as error:
        text = f"the result cannot be sent to the parent: {error!r}"
        pipe.send(_Failure(time.monotonic(), rank, type(error).__name__, text))
    if isinstance(message, _Failure):
        os._exit(1)  # closes the sockets, so that blocked peers fail at once
    while True:  # keep the sockets open for slower peers; the parent ends all ranks together
        signal.pause()


def _collect(
    processes: Sequence[ForkProcess], pipes: Sequence[Connection], folder: Path, timeout_s: float
) -> list[Any]:
    """Results in rank order, once all ranks are done."""
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) + len(failures) < len(processes):
        open_ranks = [r for r in range(len(processes)) if r not in results and r not in failures]
        remaining = deadline - time.monotonic()
        ready = wait(
            [pipes[r] for r in open_ranks] + [processes[r].sentinel for r in open_ranks],
            max(0.0, remaining),
        )
        seen_s = time.monotonic()
        for rank in open_ranks:
            if pipes[rank] not in ready and processes[rank].sentinel not in ready:
                continue
            message = _message(pipes[rank]) or _death(processes[rank], rank, seen_s)
            if isinstance(message, _Failure):
                failures[rank] = message
                deadline = min(deadline, seen_s + GRACE_S)
            else:
                results[rank] = message.value
        if not ready and remaining <= 0:
            break
    if failures:
        first = min(failures.values(), key=lambda failure: failure.time_s)
        raise RankFailure(first.rank, first.error, _describe(first, failures, len(processes)))
    if len(results) < len(processes):
        late = [rank for rank in range(len(processes)) if rank not in results]
        raise RankTimeout(
            f"ranks {late} of {len(processes)} had not finished after {timeout_s:g} s\n"
            + _stacks(processes, folder, late)
        )
    return [results[rank] for rank in range(len(processes))]


def _message(pipe: Connection) -> _Failure | _Done | None:
    try:
        message: _Failure | _Done | None = pipe.recv() if pipe.poll() else None
    except (EOFError, ConnectionResetError):
        return None
    return message


def _death(process: ForkProcess, rank: int, seen_s: float) -> _Failure:
    """The failure of a rank that ended without a word."""
    process.join()
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name
        return _Failure(seen_s - NOTICE_S, rank, name, f"killed by signal {-code} ({name})")
    return _Failure(seen_s - NOTICE_S, rank, "SystemExit", f"ended by itself with exit code {code}")


def _describe(first: _Failure, failures: Mapping[int, _Failure], world_size: int) -> str:
    lines = [f"rank {first.rank} of {world_size} failed first:\n{first.text}"]
    for failure in sorted(failures.values(), key=lambda f: f.time_s):
        if failure is not first:
            last = failure.text.strip().splitlines()[-1][:200]
            lines.append(f"{failure.time_s - first.time_s:.3f} s later rank {failure.rank}: {last}")
    return "\n".join(lines)


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _stacks(processes: Sequence[ForkProcess], folder: Path, ranks: Sequence[int]) -> str:
    """Where these ranks stand, from their fault handlers."""
    for rank in ranks:
        if processes[rank].pid is not None and processes[rank].is_alive():
            os.kill(processes[rank].pid or 0, signal.SIGUSR1)
    time.sleep(0.3)
    texts = [f"rank {rank}:\n{_stack_file(folder, rank).read_text()}" for rank in ranks]
    return "\n".join(texts)


def _end(processes: Sequence[ForkProcess], pipes: Sequence[Connection]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        process.close()
    for pipe in pipes:
        pipe.close()


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies (Linux), so that no rank is orphaned."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
