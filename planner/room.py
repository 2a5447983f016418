"""Which partial choices may fit in memory, for many at once, with array arithmetic.

Bytes of a GPU are what stays of all calls that cover it, parameters that calls of a role share
counted once, and the most that one of them works with (`planner.memory`; what offload frees is
taken as free, so nothing that fits is refused). Two tests, both of which every choice that fits passes:
the first GPU of each decided call, and shares of the cluster (`planner.windows.shares`): as no GPU
holds more than its capacity, the sum of bytes x share is at most the capacity, for what stays and
the working bytes of any one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.windows import Bools, Floats, Ints, shares

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bytes:
    """Of the items of one call. Items with equal `owners` share their parameters."""

    parameters: Longs
    state: Longs
    working: Longs
    owners: Ints

    def only(self, kept: Ints) -> Bytes:
        return Bytes(self.parameters[kept], self.state[kept], self.working[kept], self.owners[kept])


class Room:
    """`groups[call]`: calls of one role have the same. Item k of call i has `sizes[i][k]` GPUs and surely
    covers those from `first[i][k]` to `stop[i][k]`."""

    def __init__(
        self,
        items: Sequence[Bytes],
        sizes: Sequence[Ints],
        first: Sequence[Ints],
        stop: Sequence[Ints],
        groups: Sequence[int],
        num_gpus: int,
        capacity_bytes: int,
    ) -> None:
        self.items, self._first, self._stop, self._groups = items, first, stop, groups
        self._capacity = capacity_bytes
        self._shares = [[share[size] for size in sizes] for share in shares(num_gpus)]
        self._least_state = [
            [float((row[call] * item.state).min()) for call, item in enumerate(items)] for row in self._shares
        ]
        self._least_parameters = [
            [float((row[call] * item.parameters).min()) for call, item in enumerate(items)]
            for row in self._shares
        ]
        most = sum(int((i.parameters + i.state).max()) for i in items) + max(
            int(i.working.max()) for i in items
        )
        self.always_fits = most <= capacity_bytes

    def allows(self, rows: Ints, decided: Sequence[int]) -> Bools:
        """Of choices in which the same calls are decided."""
        at = {call: rows[:, call] for call in decided}
        own = self._own(at, decided)
        fits = np.ones(len(rows), dtype=np.bool_)
        for row, state, parameters in zip(
            self._shares, self._least_state, self._least_parameters, strict=True
        ):
            fits &= self._fits_by_share(row, state, parameters, at, own)
        for anchor in decided:
            first, stop = self._first[anchor][at[anchor]], self._stop[anchor][at[anchor]]
            stays: Longs | int = 0
            working = np.zeros(len(rows), dtype=np.int64)
            for call in decided:
                item, index = self.items[call], at[call]
                here = (
                    (self._first[call][index] <= first) & (first < self._stop[call][index]) & (first < stop)
                )
                stays = stays + here * (item.state[index] + own[call])
                working = np.maximum(working, here * item.working[index])
            fits &= stays + working <= self._capacity
        return fits

    def _own(self, at: dict[int, Ints], decided: Sequence[int]) -> dict[int, Longs]:
        """Parameters of each decided call, 0 where one decided before shares them."""
        own = {}
        for position, call in enumerate(decided):
            item, index = self.items[call], at[call]
            value = item.parameters[index]
            for other in decided[:position]:
                if self._groups[other] == self._groups[call]:
                    value = value * (self.items[other].owners[at[other]] != item.owners[index])
            own[call] = value
        return own

    def _fits_by_share(
        self,
        row: Sequence[Floats],
        least_state: Sequence[float],
        least_parameters: Sequence[float],
        at: dict[int, Ints],
        own: dict[int, Longs],
    ) -> Bools:
        known = {self._groups[call] for call in at}
        total: Floats | float = 0.0
        for call, group in enumerate(self._groups):
            if call in at:
                total = total + row[call][at[call]] * (self.items[call].state[at[call]] + own[call])
                continue
            total = total + least_state[call]
            if group not in known:  # calls of a role that nothing is known of may share one copy
                known.add(group)
                same = [c for c, other in enumerate(self._groups) if other == group]
                total = total + min(least_parameters[c] for c in same)
        most: Floats | float = 0.0
        for call, index in at.items():
            most = np.maximum(most, row[call][index] * self.items[call].working[index])
        found: Bools = np.less_equal(total + most, self._capacity * (1 + 1e-12))
        return found
