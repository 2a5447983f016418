"""Samples from moments in which the machine had its usual pace, where there are such.

Cores of a shared machine are slower at times, by half, for tenths of a second to minutes: as if somebody else
was at the same physical core. What is measured meanwhile is of another machine. Decides which samples count;
on a machine that is slow all the time, all do. Only of hosts.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from realloc.pace import ALIKE
from runtime.pace import Probe

_T = TypeVar("_T")


@dataclass(frozen=True)
class Paced(Generic[_T]):
    """A sample, and the slower of the pace before and after it: seconds of `runtime.pace.Probe`."""

    value: _T
    pace_s: float


class CalmMoments:
    """What is known of the pace so far: the tenth part of the moments that were fastest is the usual one."""

    def __init__(self) -> None:
        self._probe = Probe()
        self._known: list[float] = []

    def learn(self, count: int) -> None:
        """Takes the pace so many times, with nobody beside."""
        for _ in range(count):
            self._sample()

    def taken(self, once: Callable[[], _T]) -> Iterator[Paced[_T]]:
        """What `once` gives, again and again, with the pace around it."""
        before = self._sample()
        while True:
            value = once()
            after = self._sample()
            yield Paced(value, max(before, after))
            before = after

    def _sample(self) -> float:
        seconds = self._probe.seconds()
        insort(self._known, seconds)
        return seconds

    def times_usual(self, taken: Iterable[Paced[_T]]) -> list[float]:
        """How many times longer than the usual one the pace of each is."""
        usual_s = self._known[len(self._known) // 10]
        return [each.pace_s / usual_s for each in taken]

    def num_calm(self, taken: Iterable[Paced[_T]]) -> int:
        """How many were taken at the usual pace."""
        return sum(times <= ALIKE for times in self.times_usual(taken))

    def chosen(self, taken: Sequence[Paced[_T]], least: int) -> Sequence[Paced[_T]]:
        """Those; where they are fewer than there must be, those of the faster moments among these."""
        times = self.times_usual(taken)
        most = most_times(times, least)
        return [each for each, found in zip(taken, times, strict=True) if found <= most]


def most_times(times: Sequence[float], least: int) -> float:
    """Up to how many times the usual pace samples count, of which there must be so many at least."""
    ordered = sorted(times)
    slowest = ordered[min(least, len(ordered)) - 1]
    return ALIKE if slowest <= ALIKE else max(slowest, ALIKE * ordered[len(ordered) // 10])
