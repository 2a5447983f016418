"""Which sequence goes where: mini-batches, data-parallel shares, micro-batches.

Pure functions of lengths, the same on every rank. Mini-batches depend on positions alone, never
on the plan; shares and micro-batches are balanced by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from realloc.params import split_range

UNEVEN = 0.1
"""How much more than necessary one rank may have so that the samples of a prompt stay together."""


@dataclass(frozen=True)
class Assignment:
    """`shares[mini_batch][dp]` are positions in the batch, in ascending order."""

    shares: tuple[tuple[tuple[int, ...], ...], ...]

    def of(self, dp: int) -> tuple[int, ...]:
        """All positions of one data-parallel rank, in ascending order."""
        return tuple(sorted(p for mini_batch in self.shares for p in mini_batch[dp]))

    def owners(self) -> dict[int, int]:
        """Position -> the data-parallel rank that has it."""
        return {
            position: dp
            for mini_batch in self.shares
            for dp, share in enumerate(mini_batch)
            for position in share
        }


def balanced_split(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of `lengths` in `parts` groups of nearly equal total length.

    Longest first, each to the least loaded group (ties: the group with fewer members, then the
    first), so no group is empty when there are enough sequences. Groups list indices ascending.
    """
    loads = [(0, 0, part) for part in range(parts)]
    groups: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, members, part = min(loads)
        loads[part] = (load + lengths[index], members + 1, part)
        groups[part].append(index)
    return [sorted(group) for group in groups]


def assign(lengths: Sequence[int], mini_batches: int, dp: int, together: int = 1) -> Assignment:
    """Mini-batches by position, each split over `dp` ranks by length.

    Each `together` neighbours stay on one rank where that leaves the ranks about as balanced.
    """
    shares = []
    for part in range(mini_batches):
        first, stop = split_range(len(lengths), mini_batches, part)
        split = split_together(lengths[first:stop], dp, together)
        shares.append(tuple(tuple(first + i for i in group) for group in split))
    return Assignment(tuple(shares))


def split_together(lengths: Sequence[int], parts: int, together: int) -> list[list[int]]:
    """`balanced_split` of each `together` neighbours as one, unless that is too uneven.

    Too uneven: the longest or the largest group exceeds that of the free split by more than
    `UNEVEN` of it.
    """
    free = balanced_split(lengths, parts)
    if together == 1 or len(lengths) % together:
        return free
    firsts = range(0, len(lengths), together)
    units = balanced_split([sum(lengths[i : i + together]) for i in firsts], parts)
    bound = [[i * together + j for i in group for j in range(together)] for group in units]

    def most(split: list[list[int]]) -> tuple[int, int]:
        return max(sum(lengths[i] for i in group) for group in split), max(map(len, split))

    fits = all(mine <= (1 + UNEVEN) * best for mine, best in zip(most(bound), most(free), strict=True))
    return bound if fits else free


def micro_batches(positions: Sequence[int], lengths: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """`positions` in at most `count` non-empty groups, balanced by `lengths[position]`."""
    if not positions:
        return []
    groups = balanced_split([lengths[p] for p in positions], min(count, len(positions)))
    return [tuple(positions[i] for i in group) for group in groups]


def num_passes(shares: Sequence[Sequence[int]], count: int) -> int:
    """The largest number of micro-batches that any of the shares is split into."""
    return max(min(count, len(share)) for share in shares)
