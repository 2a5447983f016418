"""Seconds per iteration that a plan takes at least, from its calls' seconds and GPUs alone.

For many plans at once, complete or not, with array arithmetic. Nodes are the calls and, for every
call that reads parameters that another trains, the reallocation to it (a move). Why each bound holds
for the steady state of the augmented graph in any order of its nodes:

GPUs: each GPU is busy for at most a period in each period. So the seconds of the nodes that cover
one GPU, and the sum of seconds x share of the cluster, are at most the period. The same holds
when shares are rounded as in `shares`: nodes that run at one moment have rounded shares of at most 1
together (Fekete and Schepers, dual feasible functions, Math. Program. 91, 2001).

Windows: ranks run iterations one after the other. Between a call's start and its start an iteration
later, which is a period on average, lie all nodes that the call must come before and that it also
waits for an iteration later: because they train its parameters, or share a GPU with it. And with
them all that lies between. Nodes of a window that come in blocks, each of which must end before the
next starts, take at least the sum over blocks of: the longest path in the block, the busiest GPU's
seconds in it, or its seconds x shares.

Transfers, loads, offloads and the order of nodes on GPUs that they share are left out, which only
makes bounds smaller. Nothing is known here of candidates, memory or prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Plans:
    """Many plans. All lists are by call, `move_s` by user; all arrays have one entry for each plan.

    `seconds`, `sizes` (in GPUs) and `areas[share]` (seconds x share) may be lower bounds where a call
    is not decided. `first` to `stop` are GPUs that it surely covers; none when `stop <= first`.
    """

    seconds: Sequence[Floats]
    sizes: Sequence[Ints]
    first: Sequence[Ints]
    stop: Sequence[Ints]
    areas: Sequence[Sequence[Floats]]
    move_s: Sequence[Floats]


@dataclass(frozen=True)
class _Window:
    """What lies between two starts of `call`: those of `blocks` that are `always` in it, or that share GPUs
    with the call, and what is between (`within[node]`: the node itself and the nodes between)."""

    call: int
    always: frozenset[int]
    blocks: tuple[tuple[int, ...], ...]
    within: dict[int, tuple[int, ...]]


def shares(num_gpus: int) -> Floats:
    """`[k, size]`: the share of the cluster that `size` GPUs count as; row 0 does not round.

    Row k > 0 rounds (k + 1) x share down to a whole number and divides by k, and leaves shares that
    are such numbers as they are.
    """
    size = np.arange(num_gpus + 1)
    rows = [size / num_gpus]
    for k in (1, 2, 3):
        whole, rest = np.divmod((k + 1) * size, num_gpus)
        rows.append(np.where(rest == 0, size / num_gpus, whole / k))
    return np.array(rows)


class Windows:
    """The windows of one dataflow graph.

    `edges`: (src, dst) calls, dst reads what src writes. `users`: (call, the call that trains its
    parameters), calls of one role one after the other.
    """

    def __init__(
        self,
        num_calls: int,
        edges: Sequence[tuple[int, int]],
        users: Sequence[tuple[int, int]],
        num_gpus: int,
    ) -> None:
        self.num_calls, self.users, self.num_gpus = num_calls, tuple(users), num_gpus
        self.shares = shares(num_gpus)
        count = num_calls + len(users)
        before: list[set[int]] = [set() for _ in range(count)]
        for src, dst in edges:
            before[dst].add(src)
        for move, ends in enumerate(users, num_calls):
            before[move].update(ends)
        order = _topological(before)
        reach: list[set[int]] = [set() for _ in range(count)]
        for node in reversed(order):
            for src in before[node]:
                reach[src] |= {node} | reach[node]
        self._before = [tuple(sorted(nodes)) for nodes in before]
        # users of one role may share a reallocation: only the first one's surely is one of its own
        seen: set[int] = set()
        self._own = [trainer not in seen and not seen.add(trainer) for _, trainer in users]  # type: ignore[func-returns-value]
        self._windows = [self._window(call, order, reach) for call in range(num_calls) if reach[call]]

    def _window(self, call: int, order: Sequence[int], reach: Sequence[set[int]]) -> _Window:
        inside = [node for node in order if node in reach[call]]
        blocks: list[tuple[int, ...]] = []
        block: list[int] = []
        for at, node in enumerate(inside):
            block.append(node)
            rest = set(inside[at + 1 :])
            if all(rest <= reach[member] for member in block):
                blocks.append(tuple(block))
                block = []
        within = {x: tuple(y for y in inside if y == x or x in reach[y]) for x in inside}
        always = {move for move, ends in enumerate(self.users, self.num_calls) if ends[0] == call}
        return _Window(call, frozenset(always & set(inside)), tuple(blocks), within)

    def bounds(self, plans: Plans) -> Floats:
        """Seconds per iteration that each of the plans takes at least."""
        seconds = [*plans.seconds, *plans.move_s]
        areas = [[*plans.areas[k], *self._move_areas(plans, k)] for k in range(len(self.shares))]
        covers, shared = self._covers(plans), self._shared(plans)
        every = range(len(seconds))
        best = seconds[0]
        for row in areas:
            best = np.maximum(best, sum(row[1:], row[0]))
        for cover in covers:
            best = np.maximum(best, self._busy(cover, seconds, every, None))
        for window in self._windows:
            best = np.maximum(best, self._window_s(window, seconds, areas, covers, shared))
        return best

    def _window_s(
        self,
        window: _Window,
        seconds: Sequence[Floats],
        areas: Sequence[Sequence[Floats]],
        covers: Sequence[Sequence[Bools]],
        shared: Sequence[Sequence[Bools]],
    ) -> Floats:
        """A call's seconds and those of what lies in its window."""
        inside: dict[int, Bools | None] = {}  # None: always
        for x, nodes in window.within.items():
            for y in nodes:
                if x in window.always:
                    inside[y] = None
                elif y not in inside:
                    inside[y] = shared[window.call][x]
                elif (known := inside[y]) is not None:
                    inside[y] = known | shared[window.call][x]
        total = seconds[window.call]
        for block in window.blocks:
            part = _longest_path(block, self._before, seconds, inside)
            for row in areas:
                area = _sum(row, block, inside)
                part = area if part is None else np.maximum(part, area)
            for cover in covers:
                part = np.maximum(part, self._busy(cover, seconds, block, inside))
            total = total + part
        return total

    def _busy(
        self,
        cover: Sequence[Bools],
        seconds: Sequence[Floats],
        nodes: Sequence[int],
        inside: dict[int, Bools | None] | None,
    ) -> Floats:
        """Seconds of those of the nodes that cover one GPU."""
        total = np.zeros_like(seconds[0])
        for node in nodes:
            if node >= self.num_calls and not self._own[node - self.num_calls]:
                continue
            mask = cover[node]
            if inside is not None and (member := inside[node]) is not None:
                mask = mask & member
            total += mask * seconds[node]
        return total

    def _covers(self, plans: Plans) -> list[list[Bools]]:
        """`[i][x]`: whether node x covers the first GPU that call i surely covers."""
        found = []
        for first, stop in zip(plans.first, plans.stop, strict=True):
            row = [
                (low <= first) & (first < high) & (first < stop)
                for low, high in zip(plans.first, plans.stop, strict=True)
            ]
            found.append([*row, *(row[user] | row[trainer] for user, trainer in self.users)])
        return found

    def _shared(self, plans: Plans) -> list[list[Bools]]:
        """`[i][x]`: whether call i and node x surely have a GPU in common.

        So do two calls that together have more GPUs than the cluster.
        """
        found = []
        for i in range(self.num_calls):
            row = [
                (plans.sizes[i] + plans.sizes[x] > self.num_gpus)
                | (np.maximum(plans.first[i], plans.first[x]) < np.minimum(plans.stop[i], plans.stop[x]))
                for x in range(self.num_calls)
            ]
            row[i] = np.ones_like(row[i])
            found.append([*row, *(row[user] | row[trainer] for user, trainer in self.users)])
        return found

    def _move_areas(self, plans: Plans, share: int) -> list[Floats]:
        """A move takes the GPUs of both its ends."""
        areas = []
        for (user, trainer), seconds, own in zip(self.users, plans.move_s, self._own, strict=True):
            size = np.maximum(plans.sizes[user], plans.sizes[trainer])
            areas.append(self.shares[share][size] * seconds if own else np.zeros_like(seconds))
        return areas


def _topological(before: Sequence[set[int]]) -> list[int]:
    waits = {node: set(sources) for node, sources in enumerate(before)}
    order: list[int] = []
    while waits:
        free = [node for node, sources in waits.items() if not sources & waits.keys()]
        assert free, "the graph was checked to be acyclic"
        order += free
        for node in free:
            del waits[node]
    return order


def _longest_path(
    block: Sequence[int],
    before: Sequence[Sequence[int]],
    seconds: Sequence[Floats],
    inside: dict[int, Bools | None],
) -> Floats:
    """Of the nodes of a block that are inside."""
    ends: dict[int, Floats] = {}
    best: Floats | None = None
    for node in block:
        end = seconds[node]
        earlier = [ends[src] for src in before[node] if src in ends]
        if earlier:
            start = earlier[0]
            for other in earlier[1:]:
                start = np.maximum(start, other)
            end = end + start
        if (member := inside[node]) is not None:
            end = end * member
        ends[node] = end
        best = end if best is None else np.maximum(best, end)
    assert best is not None
    return best


def _sum(row: Sequence[Floats], block: Sequence[int], inside: dict[int, Bools | None]) -> Floats:
    total: Floats | None = None
    for node in block:
        member = inside[node]
        value = row[node] if member is None else row[node] * member
        total = value if total is None else total + value
    assert total is not None
    return total
