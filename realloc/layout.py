"""Layouts: which rank holds which box of which parameter.

A pure function of (model shape, mesh, strategy); every rank derives the same layout, and a rank's
own part is a filter on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.params import ParamSpec, parameters, stage_layers, tp_range
from realloc.strategy import Strategy


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


def on_stage(spec: ParamSpec, shape: ModelShape, pp: int, stage: int) -> bool:
    """Whether pipeline stage `stage` of `pp` holds the parameter."""
    if spec.layer is not None:
        return spec.layer in stage_layers(shape, pp, stage)
    return (spec.on_first and stage == 0) or (spec.on_last and stage == pp - 1)


@lru_cache(maxsize=4096)
def shard_boxes(shape: ModelShape, tp: int, pp: int, tp_rank: int, stage: int) -> Mapping[str, Box]:
    """The boxes of one (tensor shard, pipeline stage), the same for all data replicas."""
    return {
        spec.name: shard_box(spec, tp, tp_rank)
        for spec in parameters(shape)
        if on_stage(spec, shape, pp, stage)
    }


def layout(shape: ModelShape, mesh: DeviceMesh, strategy: Strategy) -> Layout:
    """Which rank of the mesh holds which box of which parameter under the strategy."""
    boxes = {}
    for index, rank in enumerate(mesh.ranks):
        at = strategy.coordinates(index)
        boxes[rank] = shard_boxes(shape, strategy.tp, strategy.pp, at.tp, at.pp)
    return Layout(boxes)
