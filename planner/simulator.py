"""What one iteration takes in the steady state.

Exactly what the runtime does: all ranks share one order of nodes, the same in every iteration, and
each rank runs its own nodes in that order. A node starts when the nodes it waits for have ended and
all its ranks are free, and it occupies all its ranks until it ends. Only a load may do otherwise:
where the device copies from host memory on the side, it starts when its turn comes and occupies the
ranks' copy engines, and the ranks run on. Nothing is known here of calls, models or costs: only
nodes, seconds, and which ranks they occupy (as bit masks, so that a thousand ranks cost what eight
do).

The start times are the smallest solution of `end(i, t) = s(i) + max(end(j, t - lag))` over the nodes
j that i waits for: a linear system in (max, +). After a few iterations all ends grow by one
constant, the greatest ratio of seconds to lags over the cycles of the graph (Baccelli et al.,
Synchronization and Linearity, 1992, ch. 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.precedence import Arcs, Precedence, exact_period, list_schedule, rank_arcs
from realloc.augmented import AugmentedGraph, NodeKind

MOST_ITERATIONS = 24
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Busy:
    """Ranks that take part in the same nodes, and the seconds per iteration they are occupied."""

    ranks: tuple[int, ...]
    busy_s: float


@dataclass(frozen=True)
class Simulation:
    """One steady iteration. `start_s` and `end_s` count from its first start.

    `critical` are the nodes, in time order, whose seconds set the period: a cycle that spans
    `critical_iterations` iterations, so its seconds divided by them make `iteration_s`.
    """

    iteration_s: float
    start_s: Mapping[str, float]
    end_s: Mapping[str, float]
    busy: tuple[Busy, ...]
    critical: tuple[str, ...]
    critical_iterations: int


@dataclass(frozen=True)
class Steady:
    """Period and ends of all nodes in the last iteration looked at."""

    period_s: float
    ends: Sequence[float]


def steady_state(
    order: Sequence[int], arcs: Arcs, seconds: Sequence[float], ends: list[float] | None = None
) -> Steady:
    """Runs iterations until all nodes advance by the same time from one to the next.

    `ends` are those of a first iteration from a cold start, where they are known. Where the advance
    does not become even (two cycles of one length, or parts that do not wait for each other), the
    period is the greatest cycle ratio, computed exactly.
    """
    if ends is None:
        ends = _advance(order, arcs, seconds, [])
    history = [ends]
    longest_lag = arcs.longest_lag
    even, period = 0, 0.0
    for _ in range(MOST_ITERATIONS):
        new = _advance(order, arcs, seconds, history)
        gaps = [b - a for a, b in zip(ends, new, strict=True)]
        high = max(gaps)
        ends = new
        history.append(new)
        if high - min(gaps) > TOLERANCE * high:
            even = 0
        elif even and abs(high - period) <= TOLERANCE * high:
            even += 1
        else:
            even, period = 1, high
        if even >= longest_lag:  # all that the next iteration depends on moves on by one constant
            return Steady(high, ends)
    return Steady(exact_period(arcs, seconds), ends)


def _advance(
    order: Sequence[int], arcs: Arcs, seconds: Sequence[float], history: Sequence[Sequence[float]]
) -> list[float]:
    """Ends of the next iteration, given those of all iterations so far."""
    same, previous, far = arcs.same, arcs.previous, arcs.far
    ends = [0.0] * len(seconds)
    last = history[-1] if history else ()
    for i in order:
        start = 0.0
        for j in same[i]:
            start = max(start, ends[j])
        if last:
            for j in previous[i]:
                start = max(start, last[j])
            if far:
                for j, lag in far.get(i, ()):
                    if len(history) >= lag and history[-lag][j] > start:
                        start = history[-lag][j]
        ends[i] = start + seconds[i]
    return ends


def precedence_of(augmented: AugmentedGraph, order: Sequence[str]) -> Precedence:
    """The graph's edges by position in `order`, which must be topological."""
    index = {name: i for i, name in enumerate(order)}
    edges = [(index[edge.src], index[edge.dst], edge.lag) for edge in augmented.edges]
    transfers = [i for i, name in enumerate(order) if augmented.by_name[name].kind is NodeKind.TRANSFER]
    return Precedence.of(len(order), edges, transfers)


def masks_of(augmented: AugmentedGraph, order: Sequence[str]) -> list[int]:
    """Each node's ranks as a bit mask, in order."""
    return [_mask(augmented.by_name[name].ranks) for name in order]


def engine_masks(augmented: AugmentedGraph, order: Sequence[str]) -> tuple[list[int], list[int]]:
    """What nodes occupy and what they need free, with copy engines: bits above those of the ranks."""
    nodes = [augmented.by_name[name] for name in order]
    width = 1 + max(node.ranks[-1] for node in nodes)
    masks = masks_of(augmented, order)
    pairs = [
        (mask << width, mask << width | mask) if node.kind is NodeKind.LOAD else (mask, mask)
        for node, mask in zip(nodes, masks, strict=True)
    ]
    return [mask for mask, _ in pairs], [need for _, need in pairs]


def _mask(ranks: Sequence[int]) -> int:
    first, count = ranks[0], len(ranks)
    if ranks[-1] - first + 1 == count:
        return ((1 << count) - 1) << first
    return sum(1 << rank for rank in ranks)


def list_order(augmented: AugmentedGraph, node_s: Mapping[str, float]) -> tuple[str, ...]:
    """The order in which nodes start when every node starts as early as it can.

    Of the nodes that could start at the same time, the one with the longest way to the end of the
    next iteration comes first. Loads and offloads stand next to the calls they are for, so that
    memory is free for as long as possible. `node_s`: seconds of every node.
    """
    names = augmented.default_order()
    precedence = precedence_of(augmented, names)
    seconds = [node_s[name] for name in names]
    order, _ = list_schedule(precedence, seconds, masks_of(augmented, names))
    return augmented.place_copies(names[i] for i in order)


def simulate(
    augmented: AugmentedGraph,
    node_s: Mapping[str, float],
    order: Sequence[str] | None = None,
    *,
    overlaps_loads: bool = False,
) -> Simulation:
    """The steady state of the augmented graph under an order of its nodes (None: `list_order`).

    `node_s`: seconds of every node. `overlaps_loads`: loads run beside other nodes. Raises PlanError
    when the order contradicts the graph.
    """
    if order is None:
        order = list_order(augmented, node_s)
    augmented.check_order(order, "simulate")
    seconds = [node_s[name] for name in order]
    masks = masks_of(augmented, order)
    occupied, needs = engine_masks(augmented, order) if overlaps_loads else (masks, masks)
    arcs = rank_arcs(precedence_of(augmented, order), range(len(order)), occupied, needs)
    steady = steady_state(range(len(order)), arcs, seconds)
    starts = [end - s for end, s in zip(steady.ends, seconds, strict=True)]
    origin = min(starts)
    critical, lags = _critical(arcs, seconds, steady.period_s)
    return Simulation(
        iteration_s=steady.period_s,
        start_s={name: starts[i] - origin for i, name in enumerate(order)},
        end_s={name: steady.ends[i] - origin for i, name in enumerate(order)},
        busy=_busy(masks, [0.0 if a != b else s for a, b, s in zip(masks, occupied, seconds, strict=True)]),
        critical=tuple(order[i] for i in critical),
        critical_iterations=lags,
    )


def period_s(
    augmented: AugmentedGraph, node_s: Mapping[str, float], order: Sequence[str], *, overlaps_loads: bool
) -> float:
    """`iteration_s` of `simulate` alone."""
    masks = masks_of(augmented, order)
    occupied, needs = engine_masks(augmented, order) if overlaps_loads else (masks, masks)
    arcs = rank_arcs(precedence_of(augmented, order), range(len(order)), occupied, needs)
    return steady_state(range(len(order)), arcs, [node_s[name] for name in order]).period_s


def _busy(masks: Sequence[int], seconds: Sequence[float]) -> tuple[Busy, ...]:
    """Occupied seconds of each class of ranks that take part in the same nodes."""
    classes: list[tuple[int, float]] = []
    for mask, spent in zip(masks, seconds, strict=True):
        split: list[tuple[int, float]] = []
        fresh = mask
        for members, total in classes:
            split += [(members & mask, total + spent), (members & ~mask, total)]
            fresh &= ~members
        classes = [(members, total) for members, total in (*split, (fresh, spent)) if members]
    found = [Busy(_ranks(members), total) for members, total in classes]
    return tuple(sorted(found, key=lambda item: item.ranks))


def _ranks(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


def _critical(arcs: Arcs, seconds: Sequence[float], period_s: float) -> tuple[list[int], int]:
    """A cycle whose seconds are `period_s` times its lags, earliest iteration first.

    Under potentials in which no arc is violated at this period, the arcs that are just tight
    contain every critical cycle, and only those cycles.
    """
    count = len(seconds)
    every = [(j, i, lag) for i in range(count) for j, lag in arcs.into(i)]
    value = [0.0] * count
    for _ in range(count + 1):
        for j, i, lag in every:
            value[i] = max(value[i], value[j] + seconds[i] - period_s * lag)
    slack = 1e-7 * max(period_s, 1e-12)
    tight: dict[int, list[tuple[int, int]]] = {i: [] for i in range(count)}
    for j, i, lag in every:
        if value[j] + seconds[i] - period_s * lag >= value[i] - slack:
            tight[i].append((j, lag))
    for root in range(count):
        found = _walk(root, tight)  # roots go in the order of the iteration: it starts the cycle
        if found is not None:
            return found
    return [], 1


def _walk(root: int, tight: Mapping[int, Sequence[tuple[int, int]]]) -> tuple[list[int], int] | None:
    """A cycle through `root` along tight arcs, backwards in time; at least one lag is on it."""
    stack: list[tuple[int, list[int], int]] = [(root, [root], 0)]
    seen: set[int] = set()
    while stack:
        node, path, lags = stack.pop()
        for before, lag in tight[node]:
            if before == root and lags + lag:
                return [root, *path[:0:-1]], lags + lag
            if before not in seen:
                seen.add(before)
                stack.append((before, [*path, before], lags + lag))
    return None
