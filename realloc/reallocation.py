"""Schedules of reallocations: the copies that turn one layout into another.

Decides who sends what to whom, and that no more crosses between ranks than must: a rank receives
exactly what its destination boxes hold and its source boxes do not. Senders are balanced among
the ranks that hold a box, those of the receiver's node first. Knows nothing of tensors, links or
the order of messages; those are for the runtime and the cost models.

Everything is decided once per class of parameters that are cut alike (`realloc.routes`). So the
summary for the planner takes milliseconds and agrees with the full schedule by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt

from realloc.augmented import Placement
from realloc.layout import Box, Layout, shard_box
from realloc.model_shape import ModelShape
from realloc.params import ParamSpec, parameters, stage_layers
from realloc.routes import (
    Cell,
    Decided,
    Held,
    ParamClass,
    Routes,
    Scale,
    ScheduleError,
    decide,
    scale_of,
    sends_by_holder,
)
from realloc.strategy import Strategy


@dataclass(frozen=True)
class Copy:
    """Rank `src` gives rank `dst` the part `box` of a parameter (global indices)."""

    param: str
    box: Box
    src: int
    dst: int


@dataclass(frozen=True)
class Schedule:
    """All copies of one reallocation, in an order that is the same on all ranks.

    Elements, not bytes: the layouts know no dtypes.
    """

    copies: tuple[Copy, ...]

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

    @cached_property
    def _sent(self) -> Mapping[int, int]:
        return _totals((copy.src, copy.box.num_elements) for copy in self.cross)

    @cached_property
    def _received(self) -> Mapping[int, int]:
        return _totals((copy.dst, copy.box.num_elements) for copy in self.cross)

    def check(self, src: Layout, dst: Layout) -> None:
        """Proves that the copies turn `src` into `dst` and that nothing moves in vain.

        Every destination box is covered exactly once, every sender holds what it sends, and what
        crosses between ranks equals `lower_bound`. Raises ScheduleError.
        """
        incoming: dict[tuple[int, str], list[Box]] = {}
        for copy in self.copies:
            held = src.boxes.get(copy.src, {}).get(copy.param)
            if held is None or held.intersect(copy.box) != copy.box:
                raise ScheduleError(f"rank {copy.src} does not hold {copy.box} of {copy.param}.")
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


@dataclass(frozen=True)
class Traffic:
    """What each rank sends and receives in a reallocation, in elements, indexed by global rank.

    The arrays reach to the last rank of either mesh; `_between_nodes` is the part that leaves or
    enters the rank's node.
    """

    sent: npt.NDArray[np.int64]
    received: npt.NDArray[np.int64]
    sent_between_nodes: npt.NDArray[np.int64]
    received_between_nodes: npt.NDArray[np.int64]


def schedule(src: Layout, dst: Layout, gpus_per_node: int) -> Schedule:
    """The copies that turn layout `src` into layout `dst`: a pure function, the same on all ranks.

    Both layouts are of the same model. Raises ScheduleError when `src` lacks a part of `dst`.
    """
    held, wanted = _by_param(src), _by_param(dst)
    scales: dict[tuple[Box, ...], Scale] = {}
    members: dict[ParamClass, list[tuple[str, Scale]]] = {}
    for param, targets in wanted.items():
        sources = held.get(param)
        if sources is None:
            raise ScheduleError(f"nobody holds {param}.")
        boxes = (*sources, *targets)
        scale = scales.get(boxes)
        if scale is None:
            scale = scales[boxes] = scale_of(boxes)
        cls = ParamClass(scale.unit_elements, _scaled(scale, sources), _scaled(scale, targets))
        members.setdefault(cls, []).append((param, scale))
    last = max(chain(src.boxes, dst.boxes), default=-1)
    counts = {cls: len(params) for cls, params in members.items()}
    decided = decide(counts, gpus_per_node, [0] * (last + 1))
    copies: dict[str, list[Copy]] = {}
    for cls, params in members.items():
        boxes_up: dict[Scale, _Up] = {}
        for instance, (param, scale) in enumerate(params):
            up = boxes_up.get(scale)
            if up is None:
                up = boxes_up[scale] = _up(decided[cls].routes, scale)
            copies[param] = _copies(param, up, decided[cls], instance)
    return Schedule(tuple(chain.from_iterable(copies[param] for param in wanted)))


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


@dataclass(frozen=True)
class _Up:
    """The boxes of a class's routes in one parameter."""

    kept: tuple[Box, ...]
    routes: tuple[Box, ...]


def _up(routes: Routes, scale: Scale) -> _Up:
    return _Up(
        tuple(scale.up(cell) for cell, _ in routes.kept),
        tuple(scale.up(route.cell) for route in routes.routes),
    )


def _copies(param: str, up: _Up, decided: Decided, instance: int) -> list[Copy]:
    """The copies of the `instance`-th parameter of a class."""
    copies = [
        Copy(param, box, rank, rank)
        for box, (_, ranks) in zip(up.kept, decided.routes.kept, strict=True)
        for rank in ranks
    ]
    for box, route, order in zip(up.routes, decided.routes.routes, decided.turns, strict=True):
        turn = instance * len(route.receivers)
        for i, receiver in enumerate(route.receivers):
            copies.append(Copy(param, box, order[(turn + i) % len(order)], receiver))
    return copies


def schedule_bytes(shape: ModelShape, src: Placement, dst: Placement) -> Traffic:
    """What each rank sends and receives in `schedule(layout(src), layout(dst))`, in elements.

    Exact, without making the copies: layers with the same pipeline stages before and after are
    counted, not listed. Results are kept by layout, so micro-batches do not count; the arrays are
    shared between callers and read-only.
    """
    return _traffic(shape, _plain(src), _plain(dst))


def _plain(placement: Placement) -> Placement:
    """The placement without what does not matter to its layout."""
    strategy = placement.strategy
    return Placement(placement.mesh, Strategy(strategy.dp, strategy.tp, strategy.pp))


@lru_cache(maxsize=8192)
def _traffic(shape: ModelShape, src: Placement, dst: Placement) -> Traffic:
    counts: dict[ParamClass, int] = {}
    for cls, count in _classes(shape, src, dst):
        counts[cls] = counts.get(cls, 0) + count
    size = max(src.mesh.ranks[-1], dst.mesh.ranks[-1]) + 1
    sent = [0] * size
    received, sent_far, received_far = [0] * size, [0] * size, [0] * size
    for cls, decided in decide(counts, src.mesh.gpus_per_node, sent).items():
        for route, order in zip(decided.routes.routes, decided.turns, strict=True):
            elements = route.elements * cls.unit_elements
            for rank in route.receivers:
                received[rank] += counts[cls] * elements
            if route.near:
                continue
            for rank in route.receivers:
                received_far[rank] += counts[cls] * elements
            for rank, sends in sends_by_holder(route, order, counts[cls]):
                sent_far[rank] += sends * elements
    return Traffic(_array(sent), _array(received), _array(sent_far), _array(received_far))


def _array(values: Sequence[int]) -> npt.NDArray[np.int64]:
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False
    return array


def _classes(shape: ModelShape, src: Placement, dst: Placement) -> Iterable[tuple[ParamClass, int]]:
    """The classes of `schedule` between two placements, some of them in several parts."""
    pairs = _stage_pairs(shape, src.strategy.pp, dst.strategy.pp)
    kinds: dict[tuple[tuple[int, ...], int | None, int], tuple[ParamSpec, int]] = {}
    for spec in parameters(shape):
        if spec.layer == 0:
            kind = (spec.shape, spec.tp_dim, spec.unit)
            kinds[kind] = (spec, kinds.get(kind, (spec, 0))[1] + 1)
    memo: dict[tuple[bool, tuple[int, ...], tuple[Cell, ...]], Held] = {}

    def held(source: bool, stages: tuple[int, ...], cells: tuple[Cell, ...]) -> Held:
        key = (source, stages, cells)
        if key not in memo:
            memo[key] = _held(src if source else dst, stages, cells)
        return memo[key]

    for spec, alike in kinds.values():
        unit, ours, theirs = _shard_cells(spec, src.strategy.tp, dst.strategy.tp)
        for (a, b), layers in pairs.items():
            yield ParamClass(unit, held(True, (a,), ours), held(False, (b,), theirs)), layers * alike
    for spec in parameters(shape):
        if spec.layer is None:
            unit, ours, theirs = _shard_cells(spec, src.strategy.tp, dst.strategy.tp)
            before, after = _ends(spec, src.strategy.pp), _ends(spec, dst.strategy.pp)
            yield ParamClass(unit, held(True, before, ours), held(False, after, theirs)), 1


@lru_cache(maxsize=1024)
def _stage_pairs(shape: ModelShape, pp: int, new_pp: int) -> Mapping[tuple[int, int], int]:
    """(stage before, stage after) -> how many layers go that way."""
    before = [s for s in range(pp) for _ in stage_layers(shape, pp, s)]
    after = [s for s in range(new_pp) for _ in stage_layers(shape, new_pp, s)]
    pairs: dict[tuple[int, int], int] = {}
    for pair in zip(before, after, strict=True):
        pairs[pair] = pairs.get(pair, 0) + 1
    return pairs


@lru_cache(maxsize=4096)
def _shard_cells(spec: ParamSpec, tp: int, new_tp: int) -> tuple[int, tuple[Cell, ...], tuple[Cell, ...]]:
    """Elements of a unit, and the scaled box of every tensor shard before and after."""
    ours = [shard_box(spec, tp, i) for i in range(tp)]
    theirs = [shard_box(spec, new_tp, i) for i in range(new_tp)]
    scale = scale_of([*ours, *theirs])
    return scale.unit_elements, tuple(map(scale.down, ours)), tuple(map(scale.down, theirs))


def _ends(spec: ParamSpec, pp: int) -> tuple[int, ...]:
    """The stages of a parameter that belongs to no layer."""
    first = {0} if spec.on_first else set()
    return tuple(sorted(first | ({pp - 1} if spec.on_last else set())))


def _held(placement: Placement, stages: Sequence[int], cells: Sequence[Cell]) -> Held:
    """Which ranks of these stages hold which scaled box; `cells` are those of the tensor shards."""
    strategy, first = placement.strategy, placement.mesh.first
    by_cell: dict[Cell, list[int]] = {}
    for tp, cell in enumerate(cells):
        ranks = by_cell.setdefault(cell, [])
        for stage in stages:
            start = first + stage * strategy.dp * strategy.tp + tp
            ranks += range(start, start + strategy.dp * strategy.tp, strategy.tp)
    return tuple(sorted((cell, tuple(sorted(ranks))) for cell, ranks in by_cell.items()))
