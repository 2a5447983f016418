"""Who may send which part of a parameter to whom, and whose turn it is.

Parameters that are cut alike share their geometry: boxes are scaled down by the greatest common
divisor of their cuts (a dim that nobody cuts disappears), and everything is decided once per
class of parameters with equal scaled boxes on equal ranks. Knows no names of parameters, no
placements and no tensors.

A part goes to a node that lacks it once: one of the ranks there that want it, the gateway,
receives it and hands it to the others. The ranks that hold a part send it in turn, gateways take
turns too, and a part with few turns is cut into pieces so that all have their share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, product
from math import gcd, prod
from typing import NamedTuple, TypeAlias

from realloc.layout import Box

MIN_PIECE_ELEMENTS = 1 << 15
"""Parts are not cut into pieces smaller than this: 64 KiB of bfloat16."""
_MAX_PIECES = 16
_ENOUGH_TURNS = 8
"""With so many turns for each sender, one turn more or less does not matter."""

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
    def kind(self) -> Kind:
        rest = (n for d, n in enumerate(self.whole.shape) if d not in self.dims)
        rows = self.factors[0] if self.dims[:1] == (0,) else self.whole.shape[0]
        return Kind(prod(self.factors) * prod(rest), rows)

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


class Kind(NamedTuple):
    """What differs between the parameters of a class.

    `unit_elements` are the elements of one unit of the scaled boxes, `unit_rows` the rows of which
    every part has a whole multiple.
    """

    unit_elements: int
    unit_rows: int


class Part(NamedTuple):
    """A part that the same ranks hold and the same ranks want, in units.

    `holding` and `wanting` are indices of source and destination cells.
    """

    cell: Cell
    units: int
    holding: tuple[int, ...]
    wanting: tuple[int, ...]


@lru_cache(maxsize=4096)
def overlay(src: tuple[Cell, ...], dst: tuple[Cell, ...]) -> tuple[Part, ...]:
    """Everything that is wanted, cut along the edges of all cells.

    Raises ScheduleError when nobody holds a wanted part.
    """
    edges = [
        sorted({edge[dim] for cell in chain(src, dst) for edge in cell}) for dim in range(len(dst[0][0]))
    ]
    place = [{edge: i for i, edge in enumerate(along)} for along in edges]

    def covered(cells: tuple[Cell, ...]) -> dict[tuple[int, ...], list[int]]:
        by_position: dict[tuple[int, ...], list[int]] = {}
        for i, cell in enumerate(cells):
            spans = (range(at[low], at[high]) for at, low, high in zip(place, *cell, strict=True))
            for position in product(*spans):
                by_position.setdefault(position, []).append(i)
        return by_position

    held, parts = covered(src), []
    for position, wanting in sorted(covered(dst).items()):
        start = tuple(along[i] for along, i in zip(edges, position, strict=True))
        stop = tuple(along[i + 1] for along, i in zip(edges, position, strict=True))
        if position not in held:
            raise ScheduleError(f"nobody holds {start} to {stop} (scaled), which is wanted.")
        units = prod(b - a for a, b in zip(start, stop, strict=True))
        parts.append(Part((start, stop), units, tuple(held[position]), tuple(wanting)))
    return tuple(parts)


@lru_cache(maxsize=65536)
def num_pieces(
    count: int, kind: Kind, units: int, nodes: int, holders: int, gateways: int, near_holders: int
) -> int:
    """Into how many equal pieces to cut a part of each of `count` parameters, so that turns come out even.

    The part goes to `nodes` nodes that lack it, from `holders` ranks, through up to `gateways`
    ranks of a node; on nodes that have it, up to `near_holders` ranks share the sends.
    """
    most = min(_MAX_PIECES, kind.unit_elements * units // MIN_PIECE_ELEMENTS)
    shares = ((count * nodes, holders), (count, gateways if nodes else 1), (count, near_holders))
    wished = 1
    for turns, ranks in shares:
        if turns and ranks > 1 and turns < _ENOUGH_TURNS * ranks:
            wished = max(wished, ranks // gcd(turns, ranks))
    return max((n for n in range(1, min(wished, most) + 1) if kind.unit_rows % n == 0), default=1)


@dataclass(frozen=True)
class Route:
    """How a part reaches those who want it.

    `index` is its number in its class, where turns begin. `kept` are ranks that hold and want it,
    `near` nodes that have it (holders, receivers), `far` receivers on each of the other nodes.
    """

    index: int
    cell: Cell
    units: int
    holders: tuple[int, ...]
    kept: tuple[int, ...]
    near: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    far: tuple[tuple[int, ...], ...]

    def pieces(self, kind: Kind, count: int) -> int:
        """Into how many pieces the part of each of `count` parameters of a kind is cut."""
        return num_pieces(
            count,
            kind,
            self.units,
            len(self.far),
            len(self.holders),
            max(map(len, self.far), default=0),
            max((len(holders) for holders, _ in self.near), default=0),
        )


def find_routes(src: Held, dst: Held, gpus_per_node: int) -> tuple[Route, ...]:
    """The routes of a class. Raises ScheduleError when nobody holds a wanted part."""
    routes = []
    parts = overlay(tuple(cell for cell, _ in src), tuple(cell for cell, _ in dst))
    for index, part in enumerate(parts):
        holders = tuple(sorted(chain.from_iterable(src[i][1] for i in part.holding)))
        wanting = sorted(chain.from_iterable(dst[i][1] for i in part.wanting))
        holds = set(holders)
        near: dict[int, list[int]] = {}
        for rank in holders:
            near.setdefault(rank // gpus_per_node, []).append(rank)
        by_node: dict[int, list[int]] = {}
        for rank in wanting:
            if rank not in holds:
                by_node.setdefault(rank // gpus_per_node, []).append(rank)
        routes.append(
            Route(
                index,
                part.cell,
                part.units,
                holders,
                tuple(rank for rank in wanting if rank in holds),
                tuple((tuple(near[n]), tuple(ranks)) for n, ranks in by_node.items() if n in near),
                tuple(tuple(ranks) for n, ranks in by_node.items() if n not in near),
            )
        )
    return tuple(routes)


class Send(NamedTuple):
    """A piece of a part goes from one rank to another. `relay`: the sender received it before."""

    piece: int
    src: int
    dst: int
    relay: bool


def sends(route: Route, pieces: int, turn: int, rank: int | None = None) -> list[Send]:
    """The sends of a route for one parameter, whose first turn is `turn`; those of a rank alone if given."""
    found = []
    for piece in range(pieces):
        at = turn + piece
        for holders, receivers in route.near:
            if rank is not None and rank not in holders and rank not in receivers:
                continue
            start = at * len(receivers) + route.index
            found += [
                Send(piece, holders[(start + i) % len(holders)], receiver, False)
                for i, receiver in enumerate(receivers)
            ]
        start, count = at * len(route.far) + route.index, len(route.holders)
        for j in _concerned(route, start, rank):
            receivers = route.far[j]
            gateway = receivers[(at + route.index) % len(receivers)]
            found.append(Send(piece, route.holders[(start + j) % count], gateway, False))
            found += [Send(piece, gateway, receiver, True) for receiver in receivers if receiver != gateway]
    return found if rank is None else [send for send in found if rank in (send.src, send.dst)]


def _concerned(route: Route, start: int, rank: int | None) -> Sequence[int]:
    """The nodes (indices of `far`) that this rank sends to or is one of."""
    if rank is None:
        return range(len(route.far))
    if rank in route.holders:
        count = len(route.holders)
        return range((route.holders.index(rank) - start) % count, len(route.far), count)
    return [j for j, receivers in enumerate(route.far) if rank in receivers]
