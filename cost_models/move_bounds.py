"""Seconds that a reallocation takes at least, in microseconds instead of milliseconds.

A search asks for many more reallocations than matter; most are ruled out by what they take at least.
Counts layers instead of boxes, and can leave open where the meshes lie. Why no reallocation takes less
(`cost_models.moves` prices the busiest rank, `realloc.reallocation` says who gets what):

Every rank receives what it needs and does not hold, once. Of the layers that ranks of a node need and
none of its ranks holds, all elements enter the node at least once, over its slow link; what else its
ranks receive, other ranks of the node send. The elements of a layer that enter nodes are sent by the
ranks that hold it. The busiest of any set of ranks is at least as busy as their mean.

Only parameters of layers count, messages have no latency, and a rank that nothing is known of holds
the part of the old layout that has most in common with what it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cost_models.profile import HardwareProfile
from realloc.augmented import Placement
from realloc.model_shape import ModelShape
from realloc.params import ParamSpec, parameters, stage_layers, tp_range
from realloc.strategy import Strategy

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def least_reallocate_s(
    profile: HardwareProfile,
    shape: ModelShape,
    element_bytes: int,
    src: Placement,
    dst: Placement,
    *,
    anywhere: bool = False,
) -> float:
    """At most `cost_models.moves.reallocate_s`; `anywhere`: wherever meshes of these sizes lie.

    0 where it is not known: on CPUs, whose ranks may read each other's memory, for parameters split by
    ZeRO 3, and where tensor shards do not fill whole nodes.
    """
    per_node = src.mesh.gpus_per_node
    ours, theirs = _plain(src.strategy), _plain(dst.strategy)
    shards = 3 in (ours.zero, theirs.zero) or per_node % ours.tp or per_node % theirs.tp
    if shards or profile.attention.per_sequence:
        return 0.0
    offset = None if anywhere else dst.mesh.first - src.mesh.first
    if offset is not None and min(src.mesh.size, dst.mesh.size) < per_node:
        node = src.mesh.first // per_node, dst.mesh.first // per_node
        found = _needs(shape, ours, theirs, per_node, offset, node[1] - node[0])
    else:
        found = _needs(shape, ours, theirs, per_node, offset, None if offset is None else offset // per_node)
    return element_bytes * found.least_s(profile.intra_node.bytes_per_s, profile.inter_node.bytes_per_s)


@dataclass(frozen=True)
class _Needs:
    """What some sets of ranks send and receive at least, in elements.

    `rank`: what one of the ranks receives. `far[i]` and `near[i]`: what set i of `ranks[i]` ranks sends to
    and receives from other nodes, and what its ranks receive from and send to each other.
    """

    rank: float
    far: Floats
    near: Floats
    ranks: Floats

    def least_s(self, intra_per_s: float, inter_per_s: float) -> float:
        """Seconds per byte of an element."""
        far = 1 / inter_per_s
        # what need not come from other nodes may do so, if that is cheaper than to be sent and received here
        busy = (self.far * far + self.near * min(2 / intra_per_s, far)) / self.ranks
        return float(max(self.rank / max(intra_per_s, inter_per_s), busy.max()))


def _plain(strategy: Strategy) -> Strategy:
    """Without what does not decide a layout."""
    zero = 3 if strategy.zero == 3 and strategy.dp > 1 else 0
    return Strategy(strategy.dp, strategy.tp, strategy.pp, zero=zero, virtual_stages=strategy.virtual_stages)


@lru_cache(maxsize=65536)
def _needs(
    shape: ModelShape,
    src: Strategy,
    dst: Strategy,
    per_node: int,
    offset: int | None,
    node_offset: int | None,
) -> _Needs:
    """`offset`: the first rank of `dst` less that of `src`; `node_offset`: the same of their nodes."""
    element, common = _per_layer(shape, src.tp, dst.tp)
    held, needed = _stage_of(shape, src), _stage_of(shape, dst)
    alike = np.zeros((src.pp, dst.pp))
    np.add.at(alike, (held, needed), 1.0)
    received = _received(src, dst, alike, element, common, np.bincount(needed, minlength=dst.pp), offset)
    whole = float(_layer_elements(shape))
    theirs, ours = _layers_on_nodes(shape, dst, per_node), _layers_on_nodes(shape, src, per_node)
    if node_offset is None:
        entering = theirs.sum(axis=1) - (theirs @ _distinct(shape, src, per_node).T).max(axis=1)
        sent = np.maximum(0.0, theirs.sum(axis=0) - ours.sum(axis=0))
        here = np.zeros(0, dtype=np.int64)
    else:
        at = np.arange(len(theirs)) + node_offset
        inside = (at >= 0) & (at < len(ours))
        missing = theirs * (1.0 - inside[:, None] * ours[np.where(inside, at, 0)])
        entering, sent, here = missing.sum(axis=1), missing.sum(axis=0), np.flatnonzero(inside)
    by_node = received.reshape(len(theirs), -1).sum(axis=1)
    far = np.minimum(entering * whole, by_node)
    near = by_node - far
    on_node = min(per_node, src.size + dst.size)
    by_stage = np.bincount(held, sent, minlength=src.pp) * whole
    # nodes of each stage of `src`, and what the ranks there receive
    on_stage = _stages_on_nodes(src, per_node)
    arrives_far, arrives_near = np.zeros(len(ours)), np.zeros(len(ours))
    if len(here) and node_offset is not None:
        arrives_far[here + node_offset], arrives_near[here + node_offset] = far[here], near[here]
    return _Needs(
        float(received.max()),
        # every node of `dst`, all ranks, the ranks of each stage of `src`, and all ranks of their nodes
        np.concatenate([far, [2 * far.sum()], by_stage, by_stage + arrives_far @ on_stage]),
        np.concatenate([near, [near.sum()], np.zeros(src.pp), arrives_near @ on_stage]),
        np.concatenate(
            [
                np.full(len(far), on_node),
                [src.size + dst.size],
                np.full(src.pp, src.dp * src.tp),
                on_stage.sum(axis=0) * on_node,
            ]
        ),
    )


def _received(
    src: Strategy,
    dst: Strategy,
    alike: Floats,
    element: Floats,
    common: Floats,
    layers: Ints,
    offset: int | None,
) -> Floats:
    """What each rank of `dst` receives at least, in elements of layers."""
    index = np.arange(dst.size)
    group, shard = np.divmod(index, dst.tp)
    stage = group // dst.dp
    needs = layers[stage] * element[shard]
    if offset is None:
        return np.asarray(needs - alike.max(axis=0)[stage] * common.max(axis=0)[shard])
    at = index + offset
    inside = (at >= 0) & (at < src.size)
    before, old_shard = np.divmod(np.where(inside, at, 0), src.tp)
    held = inside * alike[before // src.dp, stage] * common[old_shard, shard]
    return np.asarray(needs - held)


@lru_cache(maxsize=4096)
def _stages_on_nodes(strategy: Strategy, per_node: int) -> Floats:
    """`[node, stage]`: 1 where some ranks of the node have the stage. Shards never straddle nodes."""
    groups = max(1, min(per_node, strategy.size) // strategy.tp)
    first = np.arange(0, strategy.size // strategy.tp, groups)[:, None]
    stage = np.arange(strategy.pp)
    held: Bools = (first // strategy.dp <= stage) & (stage <= (first + groups - 1) // strategy.dp)
    return held.astype(np.float64)


@lru_cache(maxsize=4096)
def _layers_on_nodes(shape: ModelShape, strategy: Strategy, per_node: int) -> Floats:
    """`[node, layer]`: 1 where some ranks of the node hold the layer."""
    found: Floats = _stages_on_nodes(strategy, per_node)[:, _stage_of(shape, strategy)]
    return found


@lru_cache(maxsize=4096)
def _distinct(shape: ModelShape, strategy: Strategy, per_node: int) -> Floats:
    return np.asarray(np.unique(_layers_on_nodes(shape, strategy, per_node), axis=0))


@lru_cache(maxsize=4096)
def _stages(shape: ModelShape, pp: int, virtual: int) -> tuple[int, ...]:
    found = [0] * shape.num_layers
    for stage in range(pp):
        for layer in stage_layers(shape, pp, stage, virtual):
            found[layer] = stage
    return tuple(found)


@lru_cache(maxsize=4096)
def _stage_of(shape: ModelShape, strategy: Strategy) -> Ints:
    """By layer."""
    return np.array(_stages(shape, strategy.pp, strategy.virtual_stages))


@lru_cache(maxsize=64)
def _layer_specs(shape: ModelShape) -> tuple[ParamSpec, ...]:
    return tuple(spec for spec in parameters(shape) if spec.layer == 0)


@lru_cache(maxsize=64)
def _layer_elements(shape: ModelShape) -> int:
    return sum(spec.num_elements for spec in _layer_specs(shape))


@lru_cache(maxsize=256)
def _per_layer(shape: ModelShape, tp: int, new_tp: int) -> tuple[Floats, Floats]:
    """`[shard]`: elements of a layer on a tensor shard of `new_tp`; `[old, new]`: what two shards share."""
    needs, common = np.zeros(new_tp), np.zeros((tp, new_tp))
    for spec in _layer_specs(shape):
        rows = 1 if spec.tp_dim is None else spec.shape[spec.tp_dim]
        old = [tp_range(spec, tp, i) or (0, rows) for i in range(tp)]
        new = [tp_range(spec, new_tp, i) or (0, rows) for i in range(new_tp)]
        width = spec.num_elements // rows
        for j, (start, stop) in enumerate(new):
            needs[j] += (stop - start) * width
            for i, (low, high) in enumerate(old):
                common[i, j] += max(0, min(stop, high) - max(start, low)) * width
    return needs, common
