"""Layouts: which rank holds which box of which parameter.

A pure function of (model shape, mesh, strategy); every rank derives the same layout, and a rank's
own part is a filter on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.params import ParamSpec, parameters, split_range, stage_layers, tp_range
from realloc.strategy import Coordinates, Strategy


@dataclass(frozen=True, order=True)
class Box:
    """A hyper-rectangle of a parameter: `start[d] <= index[d] < stop[d]` on every dim."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that select this box from a tensor that holds `outer`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))

    def is_contiguous_in(self, outer: Box) -> bool:
        """Whether the box is one run of memory in a tensor that holds `outer`."""
        sizes = list(zip(self.shape, outer.shape, strict=True))
        while sizes and sizes[0][0] == 1:
            sizes.pop(0)
        return all(inner == whole for inner, whole in sizes[1:])

    def intersect(self, other: Box) -> Box | None:
        """The common part, None when empty."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None


@dataclass(frozen=True)
class Layout:
    """`boxes[rank][param]` is the box of the parameter that the rank holds."""

    boxes: Mapping[int, Mapping[str, Box]]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.boxes)

    def num_elements(self, rank: int) -> int:
        return sum(box.num_elements for box in self.boxes.get(rank, {}).values())


def shard_box(spec: ParamSpec, tp: int, tp_rank: int) -> Box:
    """The box of `spec` on tensor-parallel rank `tp_rank` of `tp`."""
    start, stop = [0] * len(spec.shape), list(spec.shape)
    cut = tp_range(spec, tp, tp_rank)
    if cut is not None and spec.tp_dim is not None:
        start[spec.tp_dim], stop[spec.tp_dim] = cut
    return Box(tuple(start), tuple(stop))


def on_stage(spec: ParamSpec, shape: ModelShape, pp: int, stage: int, virtual: int = 1) -> bool:
    """Whether pipeline stage `stage` of `pp` holds the parameter."""
    if spec.layer is not None:
        return spec.layer in stage_layers(shape, pp, stage, virtual)
    return (spec.on_first and stage == 0) or (spec.on_last and stage == pp - 1)


@lru_cache(maxsize=4096)
def shard_boxes(
    shape: ModelShape, tp: int, pp: int, tp_rank: int, stage: int, virtual: int = 1
) -> Mapping[str, Box]:
    """The boxes of one (tensor shard, pipeline stage) before any ZeRO split."""
    layers = frozenset(stage_layers(shape, pp, stage, virtual))
    return {
        spec.name: shard_box(spec, tp, tp_rank)
        for spec in parameters(shape)
        if (spec.layer in layers if spec.layer is not None else on_stage(spec, shape, pp, stage))
    }


def zero_boxes(boxes: Mapping[str, Box], dp: int, dp_rank: int) -> Mapping[str, Box]:
    """The part of these boxes that data-parallel rank `dp_rank` keeps under ZeRO: a range of rows.

    Rows are split as evenly as whole rows allow; a box with fewer rows than ranks is on some only.
    """
    result = {}
    for name, box in boxes.items():
        start, stop = split_range(box.stop[0] - box.start[0], dp, dp_rank)
        if stop > start:
            first = box.start[0]
            result[name] = Box((first + start, *box.start[1:]), (first + stop, *box.stop[1:]))
    return result


def compute_boxes(shape: ModelShape, strategy: Strategy, at: Coordinates) -> Mapping[str, Box]:
    """The boxes that a rank computes with: its tensor shard of its pipeline stage."""
    return shard_boxes(shape, strategy.tp, strategy.pp, at.tp, at.pp, strategy.virtual_stages)


def held_boxes(shape: ModelShape, strategy: Strategy, at: Coordinates) -> Mapping[str, Box]:
    """The boxes of parameters that a rank holds between calls: a part of them under ZeRO 3."""
    boxes = compute_boxes(shape, strategy, at)
    return zero_boxes(boxes, strategy.dp, at.dp) if strategy.zero == 3 else boxes


def optimizer_boxes(shape: ModelShape, strategy: Strategy, at: Coordinates) -> Mapping[str, Box]:
    """The boxes whose optimizer states a rank keeps: a part of its parameters under ZeRO."""
    boxes = compute_boxes(shape, strategy, at)
    return zero_boxes(boxes, strategy.dp, at.dp) if strategy.zero else boxes


def layout(shape: ModelShape, mesh: DeviceMesh, strategy: Strategy) -> Layout:
    """Which rank of the mesh holds which box of which parameter under the strategy."""
    return _layout(held_boxes, shape, mesh, strategy)


def optimizer_layout(shape: ModelShape, mesh: DeviceMesh, strategy: Strategy) -> Layout:
    """Which rank of the mesh keeps the optimizer states of which box of which parameter."""
    return _layout(optimizer_boxes, shape, mesh, strategy)


def _layout(
    boxes_at: Callable[[ModelShape, Strategy, Coordinates], Mapping[str, Box]],
    shape: ModelShape,
    mesh: DeviceMesh,
    strategy: Strategy,
) -> Layout:
    made: dict[Coordinates, Mapping[str, Box]] = {}
    boxes = {}
    for index, rank in enumerate(mesh.ranks):
        at = strategy.coordinates(index)
        # replicas hold the same unless ZeRO splits over them
        key = at if strategy.zero else replace(at, dp=0)
        if key not in made:
            made[key] = boxes_at(shape, strategy, key)
        boxes[rank] = made[key]
    return Layout(boxes)
