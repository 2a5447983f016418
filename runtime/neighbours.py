"""Copies of a measuring process that do what it measures beside it, as the other ranks of a host will.

Decides how they are told; what they do is the caller's affair. Only of hosts: they are forked, and live
as long as the process that measures.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from realloc.errors import RunError

Work = Callable[[int, Callable[[], bool]], None]
"""Does what has this number again and again, until the function, asked after each time, says so."""
_ORDER = struct.Struct("i")
_STOP = -1


class Neighbours:
    """`count` of them, idle until `at`."""

    def __init__(self, count: int, work: Work) -> None:
        self._pids: list[int] = []
        self._pipes: list[tuple[int, int]] = []
        for _ in range(count):
            self._pipes.append(self._fork(work))

    def _fork(self, work: Work) -> tuple[int, int]:
        """The ends to give orders and to hear words."""
        hears, orders = os.pipe()
        words, says = os.pipe()
        if pid := os.fork():
            self._pids.append(pid)
            os.close(hears)
            os.close(says)
            return orders, words
        try:
            os.close(orders)  # ours would keep it from hearing that nobody is there any more
            os.close(words)
            for pipe in self._pipes:
                for end in pipe:
                    os.close(end)
            _serve(hears, says, work)
        finally:
            os._exit(1)

    @contextmanager
    def at(self, number: int, count: int | None = None) -> Iterator[None]:
        """`count` of them (None: all) are at it while the block runs, and idle after.

        Raises RunError when one has died.
        """
        self._tell(number, count)
        try:
            yield
        finally:
            self._tell(_STOP, count)

    def _tell(self, order: int, count: int | None) -> None:
        told = self._pipes[:count]
        for orders, _ in told:
            with suppress(BrokenPipeError):  # it will say nothing either
                os.write(orders, _ORDER.pack(order))
        for _, words in told:
            if not os.read(words, 1):
                raise RunError("realloc profile: a process that measures beside this one has died.")

    def close(self) -> None:
        """Ends them."""
        for pipe in self._pipes:
            for end in pipe:
                os.close(end)
        for pid in self._pids:
            os.waitpid(pid, 0)
        self._pipes, self._pids = [], []


def _serve(hears: int, says: int, work: Work) -> None:
    """A neighbour's life: a word when it has begun, one when it is done; over when nobody gives orders."""
    while order := os.read(hears, _ORDER.size):
        begun = False

        def stopped() -> bool:
            nonlocal begun
            if not begun:
                begun = True
                os.write(says, b"+")
            return bool(select.select([hears], [], [], 0)[0])

        work(_ORDER.unpack(order)[0], stopped)
        os.read(hears, _ORDER.size)  # the word to stop, or that nobody is there
        os.write(says, b"-")
