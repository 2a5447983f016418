"""Who may send which part of a parameter to whom, and who does.

Parameters that are cut alike share their geometry: boxes are scaled down by the greatest common
divisor of their cuts (a dim that nobody cuts disappears), and everything is decided once per
class of parameters with equal scaled boxes on equal ranks. Knows no names of parameters, no
placements and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, product
from math import gcd, prod
from typing import TypeAlias

from realloc.layout import Box

Cell: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Start and stop of a scaled box."""
Held: TypeAlias = tuple[tuple[Cell, tuple[int, ...]], ...]
"""Each scaled box and the ranks that hold it; both sorted."""


class ScheduleError(AssertionError):
    """A schedule does not do what it is for: a bug of ours, never of the user."""


@dataclass(frozen=True)
class Scale:
    """How scaled boxes of a parameter map back: kept dims and their factors, one whole box."""

    dims: tuple[int, ...]
    factors: tuple[int, ...]
    whole: Box

    @property
    def unit_elements(self) -> int:
        """Elements of the parameter in one unit of the scaled boxes."""
        rest = (n for d, n in enumerate(self.whole.shape) if d not in self.dims)
        return prod(self.factors) * prod(rest)

    def up(self, cell: Cell) -> Box:
        start, stop = list(self.whole.start), list(self.whole.stop)
        for i, (dim, factor) in enumerate(zip(self.dims, self.factors, strict=True)):
            start[dim], stop[dim] = cell[0][i] * factor, cell[1][i] * factor
        return Box(tuple(start), tuple(stop))

    def down(self, box: Box) -> Cell:
        pairs = tuple(zip(self.dims, self.factors, strict=True))
        return tuple(box.start[d] // f for d, f in pairs), tuple(box.stop[d] // f for d, f in pairs)


def scale_of(boxes: Sequence[Box]) -> Scale:
    """The coarsest scale on which all these boxes have whole-numbered corners."""
    dims, factors = [], []
    for dim in range(len(boxes[0].start)):
        ranges = {(box.start[dim], box.stop[dim]) for box in boxes}
        if len(ranges) > 1:
            dims.append(dim)
            factors.append(gcd(*chain.from_iterable(ranges)))
    return Scale(tuple(dims), tuple(factors), boxes[0])


@dataclass(frozen=True)
class Route:
    """A part that `receivers` get from `holders`; `near` when all are on one node."""

    cell: Cell
    elements: int
    holders: tuple[int, ...]
    receivers: tuple[int, ...]
    near: bool


@dataclass(frozen=True)
class Routes:
    kept: tuple[tuple[Cell, tuple[int, ...]], ...]
    """Parts that ranks hold already, and those ranks."""
    routes: tuple[Route, ...]


def _intersect(a: Cell, b: Cell) -> Cell | None:
    start, stop = tuple(map(max, a[0], b[0])), tuple(map(min, a[1], b[1]))
    return (start, stop) if all(i < j for i, j in zip(start, stop, strict=True)) else None


def _size(cell: Cell) -> int:
    return prod(j - i for i, j in zip(*cell, strict=True))


def _subtract(outer: Cell, inner: Cell) -> list[Cell]:
    """Disjoint cells that make up `outer` without `inner`, which lies within it."""
    rest = []
    start, stop = list(outer[0]), list(outer[1])
    for dim, (low, high) in enumerate(zip(*inner, strict=True)):
        if start[dim] < low:
            rest.append((tuple(start), (*stop[:dim], low, *stop[dim + 1 :])))
        if high < stop[dim]:
            rest.append(((*start[:dim], high, *start[dim + 1 :]), tuple(stop)))
        start[dim], stop[dim] = low, high
    return rest


@lru_cache(maxsize=65536)
def _parts(
    wanted: Cell, own: Cell | None, sources: tuple[Cell, ...]
) -> tuple[Cell | None, tuple[tuple[Cell, tuple[int, ...]], ...]]:
    """What of `wanted` is in `own`, and the rest cut along the sources, with those that hold it."""
    kept = _intersect(wanted, own) if own is not None else None
    parts: list[tuple[Cell, tuple[int, ...]]] = []
    for piece in [wanted] if kept is None else _subtract(wanted, kept):
        parts += _atoms(piece, sources)
    return kept, tuple(parts)


def _atoms(piece: Cell, sources: tuple[Cell, ...]) -> Iterable[tuple[Cell, tuple[int, ...]]]:
    """The piece cut along the edges of all sources that meet it, each part with those that hold it."""
    meeting = [(i, cell) for i, s in enumerate(sources) if (cell := _intersect(piece, s)) is not None]
    edges = [
        sorted({low, high, *(edge[dim] for _, cell in meeting for edge in cell)})
        for dim, (low, high) in enumerate(zip(*piece, strict=True))
    ]
    place = [{edge: i for i, edge in enumerate(along)} for along in edges]
    holding: dict[tuple[int, ...], list[int]] = {
        at: [] for at in product(*(range(len(along) - 1) for along in edges))
    }
    for i, cell in meeting:
        spans = (range(at[low], at[high]) for at, low, high in zip(place, *cell, strict=True))
        for position in product(*spans):
            holding[position].append(i)
    for position, holders in holding.items():
        start = tuple(along[i] for along, i in zip(edges, position, strict=True))
        stop = tuple(along[i + 1] for along, i in zip(edges, position, strict=True))
        yield (start, stop), tuple(holders)


def find_routes(src: Held, dst: Held, gpus_per_node: int) -> Routes:
    """Who may send which part to whom. Raises ScheduleError when nobody holds a wanted part."""
    sources = tuple(cell for cell, _ in src)
    own = {rank: cell for cell, ranks in src for rank in ranks}
    cases: dict[tuple[Cell, Cell | None], list[int]] = {}
    for wanted, ranks in dst:
        for rank in ranks:
            cases.setdefault((wanted, own.get(rank)), []).append(rank)
    kept_by: dict[Cell, list[int]] = {}
    needed: dict[tuple[Cell, tuple[int, ...]], list[int]] = {}
    for (wanted, mine), wanting in cases.items():
        kept, parts = _parts(wanted, mine, sources)
        if kept is not None:
            kept_by.setdefault(kept, []).extend(wanting)
        for atom, holding in parts:
            needed.setdefault((atom, holding), []).extend(wanting)
    routes: list[Route] = []
    for (atom, holding), receivers in needed.items():
        if not holding:
            raise ScheduleError(f"nobody holds {atom}, which ranks {receivers} want.")
        holders = tuple(sorted(chain.from_iterable(src[i][1] for i in holding)))
        routes += _by_node(atom, holders, receivers, gpus_per_node)
    return Routes(tuple((cell, tuple(sorted(r))) for cell, r in kept_by.items()), tuple(routes))


def _by_node(
    cell: Cell, holders: tuple[int, ...], receivers: Sequence[int], gpus_per_node: int
) -> Iterable[Route]:
    """Receivers get the part from holders on their own node where there are any."""
    near: dict[int, list[int]] = {}
    for holder in holders:
        near.setdefault(holder // gpus_per_node, []).append(holder)
    by_node: dict[int, list[int]] = {}
    for receiver in sorted(receivers):
        node = receiver // gpus_per_node
        by_node.setdefault(node if node in near else -1, []).append(receiver)
    size = _size(cell)
    for node, ranks in by_node.items():
        senders = holders if node < 0 else tuple(near[node])
        yield Route(cell, size, senders, tuple(ranks), node >= 0)


@dataclass(frozen=True, order=True)
class ParamClass:
    """Parameters whose scaled boxes, ranks and sizes agree."""

    unit_elements: int
    src: Held
    dst: Held


@dataclass(frozen=True)
class Decided:
    """The routes of a class, and for each the order in which its holders take turns."""

    routes: Routes
    turns: tuple[tuple[int, ...], ...]


def decide(
    counts: Mapping[ParamClass, int], gpus_per_node: int, load: list[int]
) -> dict[ParamClass, Decided]:
    """Who sends, class by class, the largest parameters first.

    The sends of a route (each of its parameters to each receiver) go to its holders in turn, the
    least loaded first. `load` counts the elements that each rank sends and is added to.
    """
    decided = {}
    routes_of: dict[tuple[Held, Held], Routes] = {}
    for cls in sorted(counts, reverse=True):
        key = (cls.src, cls.dst)
        routes = routes_of.get(key)
        if routes is None:
            routes = routes_of[key] = find_routes(cls.src, cls.dst, gpus_per_node)
        turns = []
        for route in routes.routes:
            order = route.holders
            if len(order) > 1:
                order = tuple(sorted(order, key=lambda rank: (load[rank], rank)))
            for rank, sends in sends_by_holder(route, order, counts[cls]):
                load[rank] += sends * route.elements * cls.unit_elements
            turns.append(order)
        decided[cls] = Decided(routes, tuple(turns))
    return decided


def sends_by_holder(route: Route, order: Sequence[int], count: int) -> Iterable[tuple[int, int]]:
    """How many of the route's sends fall to each holder when they take turns."""
    total, holders = count * len(route.receivers), len(order)
    for i, rank in enumerate(order[:total]):
        yield rank, (total - i + holders - 1) // holders
