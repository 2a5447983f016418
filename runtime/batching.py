"""Which sequence goes where: mini-batches, data-parallel shares, micro-batches.

Pure functions of lengths, the same on every rank. Mini-batches depend on positions alone, never
on the plan; shares and micro-batches are balanced by length.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from realloc.params import split_range

UNEVEN = 0.1
"""How much more than necessary one rank may have so that the samples of a prompt stay together."""


@dataclass(frozen=True)
class Assignment:
    """`shares[mini_batch][dp]` are positions in the batch, in ascending order."""

    shares: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """All positions, in ascending order."""
        return tuple(sorted(self.owners()))

    def among(self, positions: Collection[int]) -> Assignment:
        """Where it has these."""
        return Assignment(
            tuple(tuple(tuple(p for p in share if p in positions) for share in part) for part in self.shares)
        )

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


def assign(
    lengths: Sequence[int], mini_batches: int, dp: int, together: int = 1, *, always: bool = False
) -> Assignment:
    """Mini-batches by position, each split over `dp` ranks by length.

    Each `together` neighbours stay in one mini-batch and on one rank: `always`, or where that leaves
    the ranks about as balanced.
    """
    unit = together if always else 1
    shares = []
    for part in range(mini_batches):
        first, stop = (unit * end for end in split_range(len(lengths) // unit, mini_batches, part))
        mine = lengths[first:stop]
        split = split_units(mine, dp, unit) if always else split_together(mine, dp, together)
        shares.append(tuple(tuple(first + i for i in group) for group in split))
    return Assignment(tuple(shares))


def split_units(lengths: Sequence[int], parts: int, unit: int) -> list[list[int]]:
    """`balanced_split` of each `unit` neighbours as one."""
    firsts = range(0, len(lengths), unit)
    groups = balanced_split([sum(lengths[i : i + unit]) for i in firsts], parts)
    return [[i * unit + j for i in group for j in range(unit)] for group in groups]


def split_together(lengths: Sequence[int], parts: int, together: int) -> list[list[int]]:
    """`balanced_split` of each `together` neighbours as one, unless that is too uneven.

    Too uneven: the longest or the largest group exceeds that of the free split by more than
    `UNEVEN` of it.
    """
    free = balanced_split(lengths, parts)
    if together == 1 or len(lengths) % together:
        return free
    bound = split_units(lengths, parts, together)

    def most(split: list[list[int]]) -> tuple[int, int]:
        return max(sum(lengths[i] for i in group) for group in split), max(map(len, split))

    fits = all(mine <= (1 + UNEVEN) * best for mine, best in zip(most(bound), most(free), strict=True))
    return bound if fits else free


def micro_batches(
    positions: Sequence[int], lengths: Sequence[int], count: int, together: int = 1
) -> list[tuple[int, ...]]:
    """`positions` in at most `count` non-empty groups, balanced by `lengths[position]`.

    Each `together` neighbours among them stay in one group.
    """
    if not positions:
        return []
    parts = min(count, len(positions) // together)
    groups = split_units([lengths[p] for p in positions], parts, together)
    return [tuple(positions[i] for i in group) for group in groups]


def num_passes(shares: Sequence[Sequence[int]], count: int, together: int = 1) -> int:
    """The largest number of micro-batches that any of the shares is split into."""
    return max(min(count, len(share) // together) for share in shares)
