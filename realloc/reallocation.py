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
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from realloc.augmented import Placement
from realloc.layout import Box, Layout, shard_box, zero_boxes
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
    counted, not listed. Results are kept by layout (degrees, chunks of interleaved stages, ZeRO 3),
    so micro-batches do not count; the arrays are shared between callers and read-only.
    """
    return _traffic(shape, _plain(src), _plain(dst))


def _plain(placement: Placement) -> Placement:
    """The placement without what does not matter to its layout."""
    s = placement.strategy
    zero = 3 if s.zero == 3 and s.dp > 1 else 0
    return Placement(placement.mesh, Strategy(s.dp, s.tp, s.pp, zero=zero, virtual_stages=s.virtual_stages))


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
    before, after = src.strategy, dst.strategy
    pairs = _stage_pairs(shape, before.pp, before.virtual_stages, after.pp, after.virtual_stages)
    cuts = _shards(before), _shards(after)
    kinds: dict[tuple[tuple[int, ...], int | None, int], tuple[ParamSpec, int]] = {}
    for spec in parameters(shape):
        if spec.layer == 0:
            kind = (spec.shape, spec.tp_dim, spec.unit)
            kinds[kind] = (spec, kinds.get(kind, (spec, 0))[1] + 1)
    memo: dict[tuple[bool, tuple[int, ...], _Cells], Held] = {}

    def held(source: bool, stages: tuple[int, ...], cells: _Cells) -> Held:
        key = (source, stages, cells)
        if key not in memo:
            memo[key] = _held(src if source else dst, stages, cells)
        return memo[key]

    for spec, alike in kinds.values():
        unit, ours, theirs = _shard_cells(spec, *cuts)
        for (a, b), layers in pairs.items():
            yield ParamClass(unit, held(True, (a,), ours), held(False, (b,), theirs)), layers * alike
    for spec in parameters(shape):
        if spec.layer is None:
            unit, ours, theirs = _shard_cells(spec, *cuts)
            stages = _ends(spec, before.pp), _ends(spec, after.pp)
            yield ParamClass(unit, held(True, stages[0], ours), held(False, stages[1], theirs)), 1


@lru_cache(maxsize=1024)
def _stage_pairs(
    shape: ModelShape, pp: int, virtual: int, new_pp: int, new_virtual: int
) -> Mapping[tuple[int, int], int]:
    """(stage before, stage after) -> how many layers go that way."""
    before = {layer: s for s in range(pp) for layer in stage_layers(shape, pp, s, virtual)}
    after = {layer: s for s in range(new_pp) for layer in stage_layers(shape, new_pp, s, new_virtual)}
    pairs: dict[tuple[int, int], int] = {}
    for layer in range(shape.num_layers):
        pair = before[layer], after[layer]
        pairs[pair] = pairs.get(pair, 0) + 1
    return pairs


_Cells: TypeAlias = tuple[Cell | None, ...]
"""Scaled boxes of the shards of a stage: tensor shards, each in its ZeRO parts; None where empty."""


def _shards(strategy: Strategy) -> tuple[int, int]:
    """Tensor shards, and the parts that ZeRO 3 makes of each."""
    return strategy.tp, strategy.dp if strategy.zero == 3 else 1


@lru_cache(maxsize=4096)
def _shard_cells(
    spec: ParamSpec, shards: tuple[int, int], new_shards: tuple[int, int]
) -> tuple[int, _Cells, _Cells]:
    """Elements of a unit, and the scaled box of every shard before and after."""
    ours, theirs = _shard_boxes(spec, *shards), _shard_boxes(spec, *new_shards)
    scale = scale_of([box for box in (*ours, *theirs) if box is not None])

    def down(boxes: Sequence[Box | None]) -> _Cells:
        return tuple(None if box is None else scale.down(box) for box in boxes)

    return scale.unit_elements, down(ours), down(theirs)


def _shard_boxes(spec: ParamSpec, tp: int, parts: int) -> Sequence[Box | None]:
    whole = [{spec.name: shard_box(spec, tp, i)} for i in range(tp)]
    return [zero_boxes(boxes, parts, i).get(spec.name) for boxes in whole for i in range(parts)]


def _ends(spec: ParamSpec, pp: int) -> tuple[int, ...]:
    """The stages of a parameter that belongs to no layer."""
    first = {0} if spec.on_first else set()
    return tuple(sorted(first | ({pp - 1} if spec.on_last else set())))


def _held(placement: Placement, stages: Sequence[int], cells: _Cells) -> Held:
    """Which ranks of these stages hold which scaled box; `cells` are those of the shards."""
    strategy, first = placement.strategy, placement.mesh.first
    _, parts = _shards(strategy)
    by_cell: dict[Cell, list[int]] = {}
    for index, cell in enumerate(cells):
        if cell is None:
            continue
        tp, part = divmod(index, parts)
        ranks = by_cell.setdefault(cell, [])
        for stage in stages:
            start = first + stage * strategy.dp * strategy.tp + tp
            if parts > 1:
                ranks.append(start + part * strategy.tp)
            else:
                ranks += range(start, start + strategy.dp * strategy.tp, strategy.tp)
    return tuple(sorted((cell, tuple(sorted(ranks))) for cell, ranks in by_cell.items()))
