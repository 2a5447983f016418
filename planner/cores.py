"""Independent pieces of work on all cores, where forking is possible."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from realloc.errors import ReallocError

Result = TypeVar("Result")


def on_all_cores(work: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of all pieces, in their order. Each process takes every n-th piece.

    The pieces must not count on what others change. Where one raises, so does this.
    """
    number = min(len(work), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if number < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [piece() for piece in work]
    context = multiprocessing.get_context("fork")
    children = []
    for at in range(1, number):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_send, args=(work[at::number], theirs), daemon=True)
        child.start()
        theirs.close()
        children.append((at, child, ours))
    try:
        results: dict[int, Result] = dict(
            zip(range(0, len(work), number), (p() for p in work[::number]), strict=True)
        )
        for at, child, ours in children:
            try:
                found = ours.recv()
            except EOFError:  # what went wrong there goes wrong here, where it can be told
                found = [piece() for piece in work[at::number]]
            child.join()
            results |= zip(range(at, len(work), number), found, strict=True)
    finally:  # of an interrupt, too
        for _, child, _ in children:
            child.terminate()
    return [results[i] for i in range(len(work))]


def _send(work: Sequence[Callable[[], Result]], to: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of Ctrl-C, and ends this process
    try:
        found = [piece() for piece in work]
    except ReallocError:  # the parent finds out when it does the same
        return
    to.send(found)
