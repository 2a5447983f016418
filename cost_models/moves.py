"""Seconds of what happens between calls: reallocation of parameters and transfer of data.

What moves follows from `realloc.reallocation`, which the runtime executes; this module only says
how long links take to move it.
"""

from __future__ import annotations

from functools import lru_cache

from cost_models.communication import Communication, group_shape
from cost_models.compute import local_elements
from cost_models.profile import HardwareProfile
from cost_models.zero import resident_elements
from realloc.augmented import Placement
from realloc.dataflow import Call, CallKind
from realloc.layout import on_stage
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.params import parameters
from realloc.reallocation import COALESCE_BYTES, schedule_bytes
from realloc.strategy import Strategy


def reallocate_s(
    profile: HardwareProfile, shape: ModelShape, element_bytes: int, src: Placement, dst: Placement
) -> float:
    """Seconds to bring one role's parameters from the layout of `src` to that of `dst`.

    The time of the busiest rank: the bytes that it sends and receives over the links they cross,
    plus a latency for each message; meanwhile it copies what it has and keeps, for both layouts have
    memory of their own. Ranks of one CPU host read each other's memory instead (`runtime.shared_transport`):
    they copy all that they hold afterwards. (But for roles that are offloaded, which is not known here:
    memory that comes and goes is not shared.)
    """
    if src.layout_key == dst.layout_key:
        return 0.0
    traffic = schedule_bytes(shape, src, dst)
    between = traffic.sent_between_nodes + traffic.received_between_nodes
    total = traffic.sent + traffic.received
    ranks = min(len({*src.mesh.ranks, *dst.mesh.ranks}), dst.mesh.gpus_per_node)
    held = held_elements(shape, dst.strategy)
    copied_s = profile.copy_s(2.0 * element_bytes * held, ranks)  # read and written
    if profile.attention.per_sequence and not between.any():  # a CPU
        return copied_s + (_words_s(profile, src, dst, ranks) if total.any() else 0.0)
    intra, inter = profile.intra_node, profile.inter_node
    seconds = element_bytes * (between / inter.bytes_per_s + (total - between) / intra.bytes_per_s)
    busiest = int(seconds.argmax())
    link = inter if between[busiest] else intra
    # pieces are as many as the finer of both layouts cuts out of what the rank holds
    pieces = len(parameters(shape)) / max(src.strategy.pp, dst.strategy.pp)
    pieces *= max(1.0, src.strategy.tp / dst.strategy.tp, dst.strategy.tp / src.strategy.tp)
    messages = min(pieces, element_bytes * int(total[busiest]) / COALESCE_BYTES) + 1
    sent_s = (float(seconds[busiest]) + messages * link.latency_s) * _pair_contention(profile, ranks)
    return max(sent_s, copied_s)


def held_elements(shape: ModelShape, strategy: Strategy) -> int:
    """Elements of a role that the rank with the most of them holds between calls."""
    whole = _computed_with(shape, strategy.tp, strategy.pp, strategy.virtual_stages)
    return resident_elements(whole, strategy).parameters


@lru_cache(maxsize=1024)
def _computed_with(shape: ModelShape, tp: int, pp: int, virtual: int) -> int:
    """Elements that a rank of the largest stage computes with."""
    specs = parameters(shape)
    return max(
        sum(local_elements(spec, tp) for spec in specs if on_stage(spec, shape, pp, stage, virtual))
        for stage in range(pp)
    )


def _words_s(profile: HardwareProfile, src: Placement, dst: Placement, ranks: int) -> float:
    """Seconds of the two words that a reader and each of those whose memory it reads exchange."""
    senders = max(1.0, src.strategy.tp / dst.strategy.tp) * max(1.0, src.strategy.pp / dst.strategy.pp)
    return 2 * senders * profile.intra_node.latency_s * _pair_contention(profile, ranks)


def transfer_s(
    profile: HardwareProfile,
    sequences: int,
    bytes_per_sequence: float,
    keys: int,
    src: Placement,
    dst: Placement,
) -> float:
    """Seconds to bring so many keys' data from the last stage of `src` to first and last stage of `dst`.

    Every reading rank gets its replica's sequences from the writing ranks, one message from each
    replica of `src` that has some of them. Where it has written a share itself, that one stays: the
    replicas are balanced by other lengths on either side, so what it holds is one replica's part of what
    it needs. Ranks that were not in `src` are told the lengths first.
    """
    writers = src.strategy.dp * src.strategy.tp
    readers = dst.strategy.dp * dst.strategy.tp * min(2, dst.strategy.pp)
    received_sequences = sequences / dst.strategy.dp
    is_inside = src.mesh.first <= dst.mesh.first and dst.mesh.ranks[-1] <= src.mesh.ranks[-1]
    own = 1 if is_inside and src.strategy.pp == 1 else 0
    messages_in = min(src.strategy.dp - own, max(1.0, received_sequences))
    received = received_sequences * bytes_per_sequence * (1 - own / src.strategy.dp)
    sent = received * readers / writers
    messages_out = messages_in * readers / writers
    meshes = (src.mesh, dst.mesh)
    nodes = {rank // mesh.gpus_per_node for mesh in meshes for rank in (mesh.first, mesh.ranks[-1])}
    link = profile.inter_node if len(nodes) > 1 else profile.intra_node
    if src.mesh.overlaps(dst.mesh):  # some ranks both send and receive
        seconds = link.message_s(received + sent, messages_in + messages_out)
    else:
        seconds = link.message_s(max(received, sent), max(messages_in, messages_out))
    if not is_inside:
        seconds += link.message_s(8.0 * sequences)
    ranks = min(len({*src.mesh.ranks, *dst.mesh.ranks}), dst.mesh.gpus_per_node)
    beside = profile.transfer
    seconds += beside.node_s + sequences * beside.sequence_s
    seconds += received_sequences * (1 - own / src.strategy.dp) * keys * beside.value_s
    return seconds * _pair_contention(profile, ranks)


def selection_s(
    communication: Communication,
    profile: HardwareProfile,
    call: Call,
    batch: int,
    bytes_per_sequence: float,
    placement: Placement,
) -> float:
    """Seconds to tell all ranks of a mesh what a call selects of a batch, and to deal it to replicas anew.

    The replicas of a stage exchange what they have read, as in `transfer_s` from and to themselves; an
    inference deals nothing. `communication`: that of the mesh.
    """
    mesh, strategy = placement.mesh, placement.strategy
    seconds = communication.all_reduce_s(group_shape(mesh, 1, mesh.size), batch)
    if call.kind is not CallKind.TRAIN_STEP or strategy.dp == 1:
        return seconds
    ranks = DeviceMesh(mesh.first, strategy.dp * strategy.tp, mesh.gpus_per_node)
    stage = Placement(ranks, Strategy(strategy.dp, strategy.tp))
    sequences = call.num_sequences(batch)
    return seconds + transfer_s(profile, sequences, bytes_per_sequence, len(call.reads), stage, stage)


def _pair_contention(profile: HardwareProfile, ranks: int) -> float:
    """Messages were measured between two ranks; on CPU hosts more ranks share the cores."""
    return max(1.0, profile.slowdown(ranks) / profile.slowdown(2))
