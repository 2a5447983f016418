"""Schedules of reallocations: the copies that turn one layout into another.

Decides who sends what to whom, and that no more moves than must: a rank receives exactly what its
destination boxes hold and its source boxes do not, and a node receives a part that several of its
ranks lack only once; one of them relays it to the others. Senders and relaying ranks take turns
(`realloc.routes`). Layouts are arbitrary: of parameters, of optimizer states, of checkpoints.
Knows nothing of tensors, links or the order of messages; those are for the runtime and the cost
models.

Everything is decided once per class of parameters that are cut alike, so a rank can list its own
copies without listing all, and the planner gets sums without any list (`realloc.traffic`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

from realloc.layout import Box, Layout
from realloc.routes import Held, Kind, Route, Scale, ScheduleError, find_routes, overlay, scale_of, sends
from realloc.traffic import Traffic, schedule_bytes

__all__ = [
    "COALESCE_BYTES",
    "STAGING_BYTES",
    "Copy",
    "Schedule",
    "ScheduleError",
    "Traffic",
    "lower_bound",
    "node_lower_bound",
    "schedule",
    "schedule_bytes",
    "staging_bytes",
]

STAGING_BYTES = 256 << 20
"""Bytes that a rank stages at most at once, unless a user sets another bound."""
COALESCE_BYTES = 512 << 10
"""Pieces smaller than this travel in one message per pair of ranks and round (`runtime.reallocation`)."""
_SMALL_ELEMENTS = COALESCE_BYTES // 2
"""So many, of two bytes: pieces that may need staging wherever they lie."""


@dataclass(frozen=True)
class Copy:
    """Rank `src` gives rank `dst` the part `box` of a parameter (global indices).

    `relay`: the sender takes it from its destination tensors, into which another copy brought it.
    """

    param: str
    box: Box
    src: int
    dst: int
    relay: bool = False


@dataclass(frozen=True)
class Peak:
    """The most elements that any one rank sends and receives of one parameter.

    `staged` leaves out what lies contiguous in the tensors and so needs no buffer.
    """

    elements: int
    staged: int


@dataclass(frozen=True)
class Schedule:
    """Copies of one reallocation, all of them or those of one rank, in the same order on all ranks.

    Relays come after the copy that they pass on. `peaks` holds every parameter of the whole
    schedule in order, so that ranks that know only their own copies agree on rounds. Elements,
    not bytes: the layouts know no dtypes.
    """

    copies: tuple[Copy, ...]
    peaks: Mapping[str, Peak] = field(default_factory=dict)

    @cached_property
    def local(self) -> tuple[Copy, ...]:
        """Copies within a rank."""
        return tuple(copy for copy in self.copies if copy.src == copy.dst)

    @cached_property
    def cross(self) -> tuple[Copy, ...]:
        """Copies between ranks."""
        return tuple(copy for copy in self.copies if copy.src != copy.dst)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that take part."""
        return tuple(sorted({c.src for c in self.copies} | {c.dst for c in self.copies}))

    @property
    def cross_elements(self) -> int:
        return sum(self._sent.values())

    def sent_elements(self, rank: int) -> int:
        """Elements that the rank sends to others."""
        return self._sent.get(rank, 0)

    def received_elements(self, rank: int) -> int:
        """Elements that the rank receives from others."""
        return self._received.get(rank, 0)

    def of(self, rank: int) -> Schedule:
        """The part of one rank."""
        return Schedule(tuple(c for c in self.copies if rank in (c.src, c.dst)), self.peaks)

    @cached_property
    def _sent(self) -> Mapping[int, int]:
        return _totals((copy.src, copy.box.num_elements) for copy in self.cross)

    @cached_property
    def _received(self) -> Mapping[int, int]:
        return _totals((copy.dst, copy.box.num_elements) for copy in self.cross)

    def check(self, src: Layout, dst: Layout, gpus_per_node: int | None = None) -> None:
        """Proves that the copies turn `src` into `dst` and that nothing moves in vain.

        Every destination box is covered exactly once, every sender holds what it sends or, when it
        relays, has received it, what crosses between ranks equals `lower_bound`, and what crosses
        between nodes (if their size is given) `node_lower_bound`. Raises ScheduleError.
        """
        incoming: dict[tuple[int, str], list[Box]] = {}
        direct: dict[tuple[int, str], set[Box]] = {}
        for copy in self.copies:
            if copy.relay:
                if copy.box not in direct.get((copy.src, copy.param), ()):
                    raise ScheduleError(
                        f"rank {copy.src} relays {copy.box} of {copy.param} before it has it."
                    )
            else:
                held = src.boxes.get(copy.src, {}).get(copy.param)
                if held is None or held.intersect(copy.box) != copy.box:
                    raise ScheduleError(f"rank {copy.src} does not hold {copy.box} of {copy.param}.")
                direct.setdefault((copy.dst, copy.param), set()).add(copy.box)
            incoming.setdefault((copy.dst, copy.param), []).append(copy.box)
        for rank, boxes in dst.boxes.items():
            for param, box in boxes.items():
                _check_cover(param, rank, box, incoming.pop((rank, param), []))
        if incoming:
            rank, param = next(iter(incoming))
            raise ScheduleError(f"rank {rank} receives {param}, which its layout does not hold.")
        if self.cross_elements != lower_bound(src, dst):
            raise ScheduleError(
                f"{self.cross_elements} elements cross between ranks; {lower_bound(src, dst)} must."
            )
        if gpus_per_node is not None:
            self._check_nodes(node_lower_bound(src, dst, gpus_per_node), gpus_per_node)

    def _check_nodes(self, bound: int, gpus_per_node: int) -> None:
        far = [c for c in self.cross if c.src // gpus_per_node != c.dst // gpus_per_node]
        crossing = sum(copy.box.num_elements for copy in far)
        if crossing != bound:
            raise ScheduleError(f"{crossing} elements cross between nodes; {bound} must.")


def _totals(items: Iterable[tuple[int, int]]) -> Mapping[int, int]:
    totals: dict[int, int] = {}
    for rank, elements in items:
        totals[rank] = totals.get(rank, 0) + elements
    return totals


def _check_cover(param: str, rank: int, box: Box, pieces: Sequence[Box]) -> None:
    """Pieces within the box, without overlap, with its number of elements: they cover it once."""
    for i, piece in enumerate(pieces):
        if box.intersect(piece) != piece:
            raise ScheduleError(f"rank {rank} receives {piece} of {param}, outside its {box}.")
        if any(piece.intersect(other) for other in pieces[:i]):
            raise ScheduleError(f"rank {rank} receives a part of {piece} of {param} twice.")
    covered = sum(piece.num_elements for piece in pieces)
    if covered != box.num_elements:
        raise ScheduleError(f"rank {rank} gets {covered} of {box.num_elements} elements of {param}.")


def lower_bound(src: Layout, dst: Layout) -> int:
    """Elements that must cross between ranks: in a rank's destination, not in its source boxes."""
    total = 0
    for rank, boxes in dst.boxes.items():
        own = src.boxes.get(rank, {})
        for param, box in boxes.items():
            kept = box.intersect(own[param]) if param in own else None
            total += box.num_elements - (kept.num_elements if kept else 0)
    return total


def node_lower_bound(src: Layout, dst: Layout, gpus_per_node: int) -> int:
    """Elements that must cross between nodes: wanted on a node, and on none of its ranks before.

    Counted with the elements of the union of boxes, by cutting each parameter along all edges.
    """
    total = 0
    wanted: dict[tuple[int, str], set[Box]] = {}
    held: dict[tuple[int, str], set[Box]] = {}
    for which, found in ((src, held), (dst, wanted)):
        for rank, boxes in which.boxes.items():
            for param, box in boxes.items():
                found.setdefault((rank // gpus_per_node, param), set()).add(box)
    for key, lacking in wanted.items():
        there = held.get(key, set())
        total += _union_elements(lacking | there) - _union_elements(there)
    return total


def _union_elements(boxes: set[Box]) -> int:
    """Elements in any of the boxes, dim by dim along their edges."""
    if len(boxes) <= 1:
        return sum(box.num_elements for box in boxes)

    def measure(parts: Sequence[tuple[tuple[int, int], ...]]) -> int:
        if not parts[0]:
            return 1
        edges = sorted({edge for part in parts for edge in part[0]})
        total = 0
        for low, high in pairwise(edges):
            inner = [part[1:] for part in parts if part[0][0] <= low and high <= part[0][1]]
            total += (high - low) * measure(inner) if inner else 0
        return total

    return measure([tuple(zip(box.start, box.stop, strict=True)) for box in boxes])


def staging_bytes(traffic: Traffic, element_bytes: int, bound: int = STAGING_BYTES) -> int:
    """Bytes of staging buffers that no rank exceeds: what it sends and receives, up to the bound.

    Buffers are kept between reallocations. A rank whose pieces lie contiguous in its tensors, or
    which shares memory with its peers, needs less (`Reallocator.staging_bytes` tells how much).
    """
    return min(bound, int((traffic.sent + traffic.received).max(initial=0)) * element_bytes)


@dataclass(frozen=True)
class _Class:
    """Parameters whose scaled boxes and ranks agree, and their routes."""

    src: Held
    dst: Held
    routes: tuple[Route, ...]
    counts: Sequence[tuple[Kind, int]]

    @cached_property
    def turns(self) -> Mapping[Kind, tuple[tuple[int, int], ...]]:
        """For a kind, by route: the first turn and the number of pieces."""
        result: dict[Kind, tuple[tuple[int, int], ...]] = {}
        first = [0] * len(self.routes)
        for kind, count in self.counts:
            pieces = [route.pieces(kind, count) for route in self.routes]
            result[kind] = tuple(zip(first, pieces, strict=True))
            first = [turn + count * n for turn, n in zip(first, pieces, strict=True)]
        return result

    def routes_of(self, rank: int | None) -> Sequence[int]:
        """Which of the routes concern the rank."""
        if rank is None:
            return range(len(self.routes))
        return [
            i
            for i, route in enumerate(self.routes)
            if rank in route.holders or any(rank in ranks for ranks in self._receivers(route))
        ]

    def _receivers(self, route: Route) -> Iterable[tuple[int, ...]]:
        return chain((receivers for _, receivers in route.near), route.far)

    def peak(self, scale: Scale) -> Peak:
        """Bounds for one parameter."""
        unit = scale.kind.unit_elements
        load: dict[int, int] = {}
        small = 0
        strided = _strided(scale, self)
        for route, (_, pieces) in zip(self.routes, self.turns[scale.kind], strict=True):
            elements = route.units * unit
            small += elements if elements // pieces < _SMALL_ELEMENTS else 0
            piece = elements // pieces
            if route.far:
                share = -(-len(route.far) * pieces // len(route.holders)) * piece
                for rank in route.holders:
                    load[rank] = load.get(rank, 0) + share
            for ranks in route.far:
                relayed = -(-pieces // len(ranks)) * piece * (len(ranks) - 1)
                for rank in ranks:
                    load[rank] = load.get(rank, 0) + elements + relayed
            for holders, ranks in route.near:
                share = -(-len(ranks) * pieces // len(holders)) * piece
                for rank in holders:
                    load[rank] = load.get(rank, 0) + share
                for rank in ranks:
                    load[rank] = load.get(rank, 0) + elements
        most = max(load.values(), default=0)
        return Peak(most, most if strided or small else 0)


def _strided(scale: Scale, cls: _Class) -> bool:
    """Whether a part that moves is not contiguous within a box that holds or wants it."""
    src, dst = ([scale.up(cell) for cell, _ in held] for held in (cls.src, cls.dst))
    parts = overlay(tuple(cell for cell, _ in cls.src), tuple(cell for cell, _ in cls.dst))
    for route, part in zip(cls.routes, parts, strict=True):
        if route.near or route.far:
            box = scale.up(route.cell)
            outer = chain((src[i] for i in part.holding), (dst[i] for i in part.wanting))
            if not all(box.is_contiguous_in(other) for other in outer):
                return True
    return False


def schedule(src: Layout, dst: Layout, gpus_per_node: int, rank: int | None = None) -> Schedule:
    """The copies that turn layout `src` into layout `dst`: a pure function, the same on all ranks.

    With `rank`, only the copies in which it takes part. Both layouts are of the same model.
    Raises ScheduleError when `src` lacks a part of `dst`.
    """
    held, wanted = _by_param(src), _by_param(dst)
    scales: dict[tuple[Box, ...], Scale] = {}
    members: dict[tuple[Held, Held], dict[Kind, list[str]]] = {}
    scale_by_param: dict[str, Scale] = {}
    for param, targets in wanted.items():
        sources = held.get(param)
        if sources is None:
            raise ScheduleError(f"nobody holds {param}.")
        boxes = tuple(sorted({*sources, *targets}))
        scale = scales.get(boxes)
        if scale is None:
            scale = scales[boxes] = scale_of(boxes)
        scale_by_param[param] = scale
        ends = _scaled(scale, sources), _scaled(scale, targets)
        members.setdefault(ends, {}).setdefault(scale.kind, []).append(param)
    copies: dict[str, list[Copy]] = {}
    peaks: dict[str, Peak] = {}
    for (a, b), by_kind in members.items():
        counts = sorted(((kind, len(params)) for kind, params in by_kind.items()), reverse=True)
        cls = _Class(a, b, find_routes(a, b, gpus_per_node), counts)
        peak_of: dict[Scale, Peak] = {}
        concerned = cls.routes_of(rank)
        for params in by_kind.values():
            for instance, param in enumerate(params):
                scale = scale_by_param[param]
                if scale not in peak_of:
                    peak_of[scale] = cls.peak(scale)
                peaks[param] = peak_of[scale]
                copies[param] = _copies(param, scale, cls, concerned, instance, rank)
    return Schedule(
        tuple(chain.from_iterable(copies[param] for param in wanted)),
        {param: peaks[param] for param in wanted},
    )


def _by_param(layout: Layout) -> Mapping[str, Mapping[Box, list[int]]]:
    """Parameter -> box -> ranks. Ranks that share a mapping of boxes are looked at once."""
    alike: dict[int, tuple[Mapping[str, Box], list[int]]] = {}
    for rank in sorted(layout.boxes):
        boxes = layout.boxes[rank]
        alike.setdefault(id(boxes), (boxes, []))[1].append(rank)
    result: dict[str, dict[Box, list[int]]] = {}
    for boxes, ranks in alike.values():
        for param, box in boxes.items():
            result.setdefault(param, {}).setdefault(box, []).extend(ranks)
    return result


def _scaled(scale: Scale, boxes: Mapping[Box, list[int]]) -> Held:
    return tuple(sorted((scale.down(box), tuple(sorted(ranks))) for box, ranks in boxes.items()))


def _copies(
    param: str, scale: Scale, cls: _Class, concerned: Sequence[int], instance: int, rank: int | None
) -> list[Copy]:
    """The copies of the `instance`-th parameter of a kind, those of a rank alone if given."""
    copies = []
    turns = cls.turns[scale.kind]
    for i in concerned:
        route = cls.routes[i]
        first, pieces = turns[i]
        box = scale.up(route.cell)
        copies += [Copy(param, box, r, r) for r in route.kept if rank in (None, r)]
        boxes = _rows(box, pieces)
        for piece, src, dst, relay in sends(route, pieces, first + instance * pieces, rank):
            copies.append(Copy(param, boxes[piece], src, dst, relay))
    return copies


def _rows(box: Box, pieces: int) -> Sequence[Box]:
    """The box in pieces of equally many rows."""
    if pieces == 1:
        return (box,)
    step = (box.stop[0] - box.start[0]) // pieces
    lows = range(box.start[0], box.stop[0], step)
    return [Box((low, *box.start[1:]), (low + step, *box.stop[1:])) for low in lows]
