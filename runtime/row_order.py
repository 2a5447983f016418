"""Which row comes when: a pure function of (seed, index), the same on every rank and after a resume.

Decides orders, and which rows are held out. Knows nothing of what is in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

HOLDOUT = 2**32
"""The order that decides which rows are held out is that of an epoch no run reaches."""


@dataclass(frozen=True, eq=False)
class Order:
    """An endless order of rows. `groups`: the rows of each path; `weights`: how often an epoch has each.

    Without weights an epoch has every row once. With them it has, of each group, weight times as many rows
    as the group, taken from an endless shuffle of that group: a weight below 1 leaves none out for good.
    """

    groups: tuple[NDArray[np.int64], ...]
    weights: tuple[float, ...]
    seed: int

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(self._shares)

    def row(self, index: int) -> int:
        """The row at a place of the order."""
        length = len(self)
        epoch, offset = divmod(index, length)
        place = int(shuffled(length, self.seed, epoch)[offset])
        for number, share in enumerate(self._shares):
            if place < share:
                group = self.groups[number]
                if not self.weights:
                    return int(group[place])
                # a group's own endless order; its seed is not that of the others
                own, at = divmod(epoch * share + place, len(group))
                return int(group[shuffled(len(group), self.seed + (number + 1) * 2**32, own)[at]])
            place -= share
        raise AssertionError("the shares do not add up")

    @property
    def _shares(self) -> tuple[int, ...]:
        if not self.weights:
            return tuple(len(group) for group in self.groups)
        pairs = zip(self.groups, self.weights, strict=True)
        return tuple(max(1, round(len(group) * weight)) for group, weight in pairs)


def split(kept: NDArray[np.int64], holdout: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What iterations use and what is held out, at least one of each; both in the order of the rows."""
    if holdout == 0 or len(kept) < 2:
        return kept, kept[:0]
    number = min(max(1, round(holdout * len(kept))), len(kept) - 1)
    held = np.zeros(len(kept), dtype=bool)
    held[shuffled(len(kept), seed, HOLDOUT)[:number]] = True
    return kept[~held], kept[held]


def groups_of(rows: NDArray[np.int64], parts: Sequence[int]) -> tuple[NDArray[np.int64], ...]:
    """Rising row numbers by the part they are in; parts have so many rows each."""
    ends = np.cumsum(parts)
    return tuple(np.split(rows, np.searchsorted(rows, ends[:-1])))


@lru_cache(maxsize=8)
def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(count): the order of hashes of (seed, epoch, index).

    The hash is SplitMix64 (Steele, Lea and Flood 2014). Own arithmetic, because numpy may change its
    generators' streams between versions, and a resumed run must go on in the same order.
    """
    start = _mix(_mix(np.full(count, seed, dtype=np.uint64)) + np.uint64(epoch))
    keys = _mix(np.arange(count, dtype=np.uint64) + start)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's next output for each state; uint64 arithmetic wraps around."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
