"""Which rank writes which piece of a checkpoint: a pure function of layouts, the same on every rank.

Every element of every tensor is written once. Where several ranks hold the same box (data-parallel
replicas, replicated kv heads) the work is shared: a large box by rows, small boxes one by one to
whoever has least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from realloc.augmented import home_call
from realloc.layout import Box, Layout, layout, optimizer_layout
from realloc.params import split_range
from realloc.plan import ExecutionPlan
from runtime.checkpoint_files import Piece
from runtime.optimizer import EXP_AVG, EXP_AVG_SQ, MASTER

WEIGHT = "weight"
SPLIT_BYTES = 1 << 18
"""Boxes above this are cut among their holders: below, a piece costs more than it balances."""
STATE_BYTES = 4


@dataclass(frozen=True)
class Stored:
    """One state of one role: where it is held, and the bytes of an element."""

    role: str
    state: str
    layout: Layout
    element_bytes: int


def states_of(dtype: str) -> tuple[str, ...]:
    """The optimizer's states with parameters of this dtype: fp32 moments, and masters of narrow ones."""
    return (EXP_AVG, EXP_AVG_SQ) if dtype == "float32" else (MASTER, EXP_AVG, EXP_AVG_SQ)


def trained_roles(plan: ExecutionPlan) -> tuple[str, ...]:
    """The roles that a checkpoint holds, moving averages too: frozen ones come from their own folders."""
    return tuple(role for role in plan.graph.roles if plan.graph.maker(role) is not None)


def stored_of(plan: ExecutionPlan) -> list[Stored]:
    """Everything that a checkpoint of this plan holds, in the layouts of the roles' homes."""
    result = []
    for role in trained_roles(plan):
        home = plan.placements[home_call(plan.graph, role).name]
        shape = plan.experiment.role_shape(plan.graph, role)
        weights = layout(shape, home.mesh, home.strategy)
        result.append(Stored(role, WEIGHT, weights, plan.experiment.dtype_bytes))
        if plan.graph.trainer(role) is None:
            continue
        states = optimizer_layout(shape, home.mesh, home.strategy)
        result += [Stored(role, name, states, STATE_BYTES) for name in states_of(plan.experiment.dtype)]
    return result


def shares(everything: Iterable[Stored]) -> Mapping[int, tuple[Piece, ...]]:
    """Rank -> the pieces that it writes; ranks that hold nothing are absent."""
    load: dict[int, int] = {}
    pieces: dict[int, list[Piece]] = {}
    small: list[tuple[int, Piece, tuple[int, ...]]] = []

    def give(rank: int, piece: Piece, num_bytes: int) -> None:
        load[rank] = load.get(rank, 0) + num_bytes
        pieces.setdefault(rank, []).append(piece)

    for stored in everything:
        for param, boxes in _holders(stored.layout).items():
            for box, ranks in boxes.items():
                num_bytes = box.num_elements * stored.element_bytes
                if len(ranks) > 1 and num_bytes <= SPLIT_BYTES:
                    small.append((num_bytes, Piece(stored.role, stored.state, param, box), ranks))
                    continue
                for rank, part in _rows(box, ranks):
                    piece = Piece(stored.role, stored.state, param, part)
                    give(rank, piece, part.num_elements * stored.element_bytes)
    for num_bytes, piece, ranks in sorted(small, key=lambda entry: -entry[0]):
        give(min(ranks, key=lambda rank: (load.get(rank, 0), rank)), piece, num_bytes)
    return {rank: tuple(pieces[rank]) for rank in sorted(pieces)}


def _holders(where: Layout) -> Mapping[str, Mapping[Box, tuple[int, ...]]]:
    """Parameter -> box -> the ranks that hold it."""
    holders: dict[str, dict[Box, tuple[int, ...]]] = {}
    for rank, boxes in where.boxes.items():
        for param, box in boxes.items():
            held = holders.setdefault(param, {})
            held[box] = (*held.get(box, ()), rank)
    return holders


def _rows(box: Box, ranks: tuple[int, ...]) -> Iterable[tuple[int, Box]]:
    """The box cut by rows, as evenly as whole rows allow."""
    for part, rank in enumerate(ranks):
        start, stop = split_range(box.stop[0] - box.start[0], len(ranks), part)
        if stop > start:
            first = box.start[0]
            yield rank, Box((first + start, *box.start[1:]), (first + stop, *box.stop[1:]))
