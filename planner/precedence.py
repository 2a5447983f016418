"""Which node waits for which: the graph's edges, the order on shared ranks, and list scheduling.

Nodes are numbers 0 to n - 1 in a topological order of one iteration; ranks are bit masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

GIVES_WAY = 0.05


@dataclass(frozen=True)
class Precedence:
    """The edges of one iteration and those to later ones.

    `before[i]` and `after[i]`: neighbours within the iteration. `lagged[i]`: (j, lag) where i waits
    for j of `lag` iterations ago. `next[i]`: nodes of the next iteration that wait for i.
    """

    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    lagged: tuple[tuple[tuple[int, int], ...], ...]
    next: tuple[tuple[int, ...], ...]
    urgent: tuple[int, ...] = ()

    @classmethod
    def of(cls, count: int, edges: Iterable[tuple[int, int, int]], urgent: Iterable[int] = ()) -> Precedence:
        """From (src, dst, lag) triples; edges of lag 0 must go to higher numbers.

        `urgent` nodes go before all others that could start at the same time.
        """
        before: list[list[int]] = [[] for _ in range(count)]
        after: list[list[int]] = [[] for _ in range(count)]
        lagged: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        following: list[list[int]] = [[] for _ in range(count)]
        for src, dst, lag in edges:
            if lag == 0:
                assert src < dst, "edges within an iteration follow the numbering"
                before[dst].append(src)
                after[src].append(dst)
            else:
                lagged[dst].append((src, lag))
                if lag == 1:
                    following[src].append(dst)
        return cls(
            tuple(map(tuple, before)),
            tuple(map(tuple, after)),
            tuple(map(tuple, lagged)),
            tuple(map(tuple, following)),
            tuple(urgent),
        )


@dataclass(frozen=True)
class Arcs:
    """All that a node waits for, ranks included.

    `same[i]`: nodes of the same iteration, `previous[i]`: of the one before, `far[i]`: (node, lag)
    with a lag of at least 2.
    """

    same: Sequence[Sequence[int]]
    previous: Sequence[Sequence[int]]
    far: Mapping[int, Sequence[tuple[int, int]]]

    @property
    def longest_lag(self) -> int:
        return max((lag for arcs in self.far.values() for _, lag in arcs), default=1)

    def into(self, i: int) -> Iterable[tuple[int, int]]:
        """(node, lag) of everything that node i waits for."""
        yield from ((j, 0) for j in self.same[i])
        yield from ((j, 1) for j in self.previous[i])
        yield from self.far.get(i, ())


def list_schedule(
    precedence: Precedence,
    seconds: Sequence[float],
    masks: Sequence[int],
    earliest: Sequence[float] | None = None,
    urgent: Iterable[int] = (),
) -> tuple[list[int], list[float]]:
    """Order and ends of one iteration, every node as early as it can start.

    Among nodes that could start at the same time, the one with the longest way to the end of the
    next iteration goes first: what the next iteration waits for comes before what it does not.
    Urgent nodes go before all of these: a transfer behind a long call on one of its ranks would keep
    its other ranks waiting for as long. `urgent` adds to the precedence's own.

    `earliest`: when each node could start if it waited for earlier iterations alone; None: a cold
    start. With it, a node also gives way to one that comes before it in this sense, shares a rank
    with it and could start soon: within GIVES_WAY of its own seconds.
    """
    count = len(seconds)
    after, priority = precedence.after, _priorities(precedence, seconds, urgent)
    waiting = [len(arcs) for arcs in precedence.before]
    ready = [i for i in range(count) if not waiting[i]]
    left = list(range(count))
    start = [0.0] * count if earliest is None else list(earliest)
    ends = [0.0] * count
    order: list[int] = []
    while ready:
        best = ready[0]
        for i in ready:
            if start[i] < start[best] or (start[i] == start[best] and priority[i] > priority[best]):
                best = i
        if earliest is not None:
            mask, soon = masks[best], start[best] + GIVES_WAY * seconds[best]
            for i in ready:
                if masks[i] & mask and start[i] < soon and priority[i] > priority[best]:
                    best = i
        ready.remove(best)
        left.remove(best)
        order.append(best)
        end = ends[best] = start[best] + seconds[best]
        mask = masks[best]
        for i in left:
            if masks[i] & mask and start[i] < end:
                start[i] = end
        for i in after[best]:
            start[i] = max(start[i], end)
            waiting[i] -= 1
            if not waiting[i]:
                ready.append(i)
    return order, ends


def _priorities(precedence: Precedence, seconds: Sequence[float], urgent: Iterable[int]) -> list[float]:
    """Of each node, the longest way to the end of the next iteration; more for urgent ones."""
    count = len(seconds)
    after, following = precedence.after, precedence.next
    tail, priority = [0.0] * count, [0.0] * count
    for i in range(count - 1, -1, -1):
        longest = 0.0
        for j in after[i]:
            longest = max(longest, tail[j])
        tail[i] = longest + seconds[i]
    for i in range(count - 1, -1, -1):
        longest = 0.0
        for j in after[i]:
            longest = max(longest, priority[j])
        for j in following[i]:
            longest = max(longest, tail[j])
        priority[i] = longest + seconds[i]
    beyond = max(priority, default=0.0) + 1.0
    for i in {*precedence.urgent, *urgent}:
        priority[i] += beyond
    return priority


def earliest_starts(
    precedence: Precedence, masks: Sequence[int], ends: Sequence[float], period: float
) -> list[float]:
    """When nodes could start if they waited for the iteration before alone, which ended so."""
    found = []
    for i, mask in enumerate(masks):
        start = 0.0
        for j, other in enumerate(masks):
            if other & mask and ends[j] > start:
                start = ends[j]
        for j, lag in precedence.lagged[i]:
            start = max(start, ends[j] - period * (lag - 1))
        found.append(start)
    return found


def rank_arcs(
    precedence: Precedence,
    order: Sequence[int],
    masks: Sequence[int],
    needs: Sequence[int] | None = None,
) -> Arcs:
    """Adds, for every rank of every node, the node that the rank ran just before it.

    `masks`: what nodes occupy. `needs`: what must be free for them to start, where that is more.
    """
    same: list[list[int]] = [[] for _ in masks]
    previous: list[list[int]] = [[] for _ in masks]
    far: dict[int, list[tuple[int, int]]] = {}
    for position, i in enumerate(order):
        same_i, need = list(precedence.before[i]), (needs or masks)[i]
        at = position - 1
        while need and at >= 0:
            j = order[at]
            if masks[j] & need:
                same_i.append(j)
                need &= ~masks[j]
            at -= 1
        previous_i = []
        at = len(order) - 1
        while need:  # runs of the iteration before, the node's own among them, cover all that it needs
            j = order[at]
            if masks[j] & need:
                previous_i.append(j)
                need &= ~masks[j]
            at -= 1
        for j, lag in precedence.lagged[i]:
            if lag == 1:
                previous_i.append(j)
            else:
                far.setdefault(i, []).append((j, lag))
        same[i], previous[i] = same_i, previous_i
    return Arcs(same, previous, far)


def exact_period(arcs: Arcs, seconds: Sequence[float]) -> float:
    """The greatest (seconds of a cycle) / (lags of the cycle), in seconds.

    Starts from any cycle's ratio; while some cycle exceeds the ratio (a positive cycle under the
    weights seconds - ratio * lag, found by Bellman-Ford), takes that cycle's ratio instead.
    """
    count = len(seconds)
    every = [(j, i, lag) for i in range(count) for j, lag in arcs.into(i)]
    period = 0.0
    while True:
        cycle = _longer_cycle(every, seconds, period)
        if cycle is None:
            return period
        ratio = sum(seconds[i] for i, _ in cycle) / sum(lag for _, lag in cycle)
        if ratio <= period * (1 + 1e-12):
            return period
        period = ratio


def _longer_cycle(
    arcs: Sequence[tuple[int, int, int]], seconds: Sequence[float], period: float
) -> list[tuple[int, int]] | None:
    """(node, lag of the arc into it) of a cycle with a ratio above `period`, if there is one."""
    count = len(seconds)
    value = [0.0] * count
    parent: list[tuple[int, int] | None] = [None] * count
    tolerance = 1e-12 * (sum(seconds) + period)
    for _ in range(count + 1):
        changed = -1
        for j, i, lag in arcs:
            new = value[j] + seconds[i] - period * lag
            if new > value[i] + tolerance:
                value[i], parent[i], changed = new, (j, lag), i
        if changed < 0:
            return None
    node = changed
    for _ in range(count):  # after n steps back along parents one is surely on a cycle
        step = parent[node]
        if step is None:
            return None
        node = step[0]
    cycle: list[tuple[int, int]] = []
    at = node
    while True:
        step = parent[at]
        if step is None:
            return None
        cycle.append((at, step[1]))
        at = step[0]
        if at == node:
            return cycle
