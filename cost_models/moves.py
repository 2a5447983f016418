"""Seconds of what happens between calls: reallocation of parameters and transfer of data.

Bytes follow from the two layouts: every rank receives what it will hold and does not hold yet,
once; those who hold it send equal parts; a link between nodes carries a box once to each node, and
the node's own links hand it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cost_models.profile import HardwareProfile
from realloc.augmented import Placement
from realloc.model_shape import ModelShape
from realloc.params import ParamSpec, parameters, stage_layers, tp_range


@dataclass(frozen=True)
class Moved:
    """Elements that a reallocation moves, of the rank that has most of each.

    `received` and `sent` cross between ranks; `received_across` and `sent_across` are the parts of
    them that cross between nodes. `messages` is how many pieces a rank receives.
    """

    received: float
    sent: float
    received_across: float
    sent_across: float
    messages: float


def reallocate_s(
    profile: HardwareProfile, shape: ModelShape, element_bytes: int, src: Placement, dst: Placement
) -> float:
    """Seconds to bring one role's parameters from the layout of `src` to that of `dst`.

    The time of the busiest rank: bytes sent and received over the links they cross, plus a latency
    for each piece.
    """
    moved = moved_elements(shape, src, dst)
    across = element_bytes * (moved.received_across + moved.sent_across)
    within = element_bytes * (moved.received + moved.sent) - across
    link = profile.inter_node if across else profile.intra_node
    seconds = across / profile.inter_node.bytes_per_s + within / profile.intra_node.bytes_per_s
    seconds += moved.messages * link.latency_s
    ranks = len({*src.mesh.ranks, *dst.mesh.ranks})
    return seconds * _pair_contention(profile, min(ranks, dst.mesh.gpus_per_node))


def transfer_s(
    profile: HardwareProfile, total_bytes: float, num_keys: int, src: Placement, dst: Placement
) -> float:
    """Seconds to bring data of `total_bytes` over all sequences from `src` to where `dst` reads it.

    One rank of each data replica of `src` has its share; every rank of a data replica of `dst`
    gets the share of that replica.
    """
    received = total_bytes / dst.strategy.dp
    sent = total_bytes * dst.strategy.tp * dst.strategy.pp / src.strategy.dp
    meshes = (src.mesh, dst.mesh)
    nodes = {rank // mesh.gpus_per_node for mesh in meshes for rank in (mesh.first, mesh.ranks[-1])}
    link = profile.inter_node if len(nodes) > 1 else profile.intra_node
    # a consumer's share comes from as many producers as it overlaps
    messages = num_keys * max(1.0, src.strategy.dp / dst.strategy.dp)
    sends = num_keys * max(1.0, dst.strategy.size / src.strategy.dp)
    seconds = link.message_s(received + sent, messages + sends)
    ranks = len({*src.mesh.ranks, *dst.mesh.ranks})
    return seconds * _pair_contention(profile, min(ranks, dst.mesh.gpus_per_node))


def _pair_contention(profile: HardwareProfile, ranks: int) -> float:
    """Messages were measured between two ranks; on CPU hosts more ranks share the cores."""
    return profile.slowdown(ranks) / profile.slowdown(2)


@lru_cache(maxsize=65536)
def moved_elements(shape: ModelShape, src: Placement, dst: Placement) -> Moved:
    """What the reallocation from `src` to `dst` moves."""
    a, b = src.strategy, dst.strategy
    ranks = np.arange(dst.mesh.first, dst.mesh.first + dst.mesh.size)
    at = ranks - src.mesh.first
    shared = (at >= 0) & (at < src.mesh.size)
    codes = np.stack(
        [
            (ranks - dst.mesh.first) % b.tp,
            (ranks - dst.mesh.first) // (b.tp * b.dp),
            np.where(shared, at % a.tp, -1),
            np.where(shared, at // (a.tp * a.dp), -1),
        ]
    )
    kinds, counts = np.unique(codes, axis=1, return_counts=True)
    missing = []
    for tp_b, pp_b, tp_a, pp_a in kinds.T.tolist():
        needed = _overlap(shape, b.tp, tp_b, b.pp, pp_b, b.tp, tp_b, b.pp, pp_b)
        held = 0
        if tp_a >= 0:
            held = _overlap(shape, b.tp, tp_b, b.pp, pp_b, a.tp, tp_a, a.pp, pp_a)
        missing.append(needed - held)
    received = max(missing)
    total = sum(size * int(count) for size, count in zip(missing, counts, strict=True))
    if received == 0:
        return Moved(0.0, 0.0, 0.0, 0.0, 0.0)
    sent = total / src.mesh.size
    # replicas of a shard on one node get it over the slow link once
    per_node = dst.mesh.gpus_per_node
    nodes = {*(r // per_node for r in (src.mesh.first, src.mesh.ranks[-1]))}
    nodes |= {r // per_node for r in (dst.mesh.first, dst.mesh.ranks[-1])}
    across = len(nodes) > 1
    copies = max(1, min(b.dp, per_node // b.tp))
    pieces = len(parameters(shape)) / b.pp * max(1.0, a.tp / b.tp)
    return Moved(
        received=received,
        sent=sent,
        received_across=received / copies if across else 0.0,
        sent_across=sent / copies if across else 0.0,
        messages=pieces,
    )


@lru_cache(maxsize=65536)
def _overlap(
    shape: ModelShape,
    tp_a: int, rank_a: int, pp_a: int, stage_a: int,
    tp_b: int, rank_b: int, pp_b: int, stage_b: int,
) -> int:  # fmt: skip
    """Elements that two (tensor shard, stage) of two layouts have in common."""
    layers_a, layers_b = stage_layers(shape, pp_a, stage_a), stage_layers(shape, pp_b, stage_b)
    common = max(0, min(layers_a.stop, layers_b.stop) - max(layers_a.start, layers_b.start))
    elements = common * _layer_overlap(shape, tp_a, rank_a, tp_b, rank_b)
    for spec in parameters(shape):
        if spec.layer is None and _on_end(spec, pp_a, stage_a) and _on_end(spec, pp_b, stage_b):
            elements += _spec_overlap(spec, tp_a, rank_a, tp_b, rank_b)
    return elements


@lru_cache(maxsize=65536)
def _layer_overlap(shape: ModelShape, tp_a: int, rank_a: int, tp_b: int, rank_b: int) -> int:
    return sum(
        _spec_overlap(spec, tp_a, rank_a, tp_b, rank_b) for spec in parameters(shape) if spec.layer == 0
    )


def _on_end(spec: ParamSpec, pp: int, stage: int) -> bool:
    return (spec.on_first and stage == 0) or (spec.on_last and stage == pp - 1)


def _spec_overlap(spec: ParamSpec, tp_a: int, rank_a: int, tp_b: int, rank_b: int) -> int:
    a, b = tp_range(spec, tp_a, rank_a), tp_range(spec, tp_b, rank_b)
    if a is None or b is None or spec.tp_dim is None:
        return spec.num_elements
    length = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    return spec.num_elements // spec.shape[spec.tp_dim] * length
