"""How much every rank sends and receives in a reallocation, without making the copies.

The same turns as in `realloc.routes`, counted for all classes of parameters at once with array
arithmetic: milliseconds where the list of copies takes seconds. That both agree is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from realloc.augmented import Placement
from realloc.layout import Box, shard_box, zero_boxes
from realloc.model_shape import ModelShape
from realloc.params import ParamSpec, parameters, stage_layers
from realloc.routes import Cell, Kind, Part, num_pieces, overlay, scale_of
from realloc.strategy import Strategy

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """What each rank sends and receives in a reallocation, in elements, indexed by global rank.

    The arrays reach to the last rank of either mesh; `_between_nodes` is the part that leaves or
    enters the rank's node.
    """

    sent: Ints
    received: Ints
    sent_between_nodes: Ints
    received_between_nodes: Ints


def schedule_bytes(shape: ModelShape, src: Placement, dst: Placement) -> Traffic:
    """What each rank sends and receives in `schedule(layout(src), layout(dst))`, in elements.

    Exact, relays included. Results are kept by layout (degrees, chunks of interleaved stages,
    ZeRO 3), so micro-batches do not count; the arrays are shared between callers and read-only.
    """
    return _traffic(shape, _plain(src), _plain(dst))


def _plain(placement: Placement) -> Placement:
    """The placement without what does not matter to its layout."""
    s = placement.strategy
    zero = 3 if s.zero == 3 and s.dp > 1 else 0
    return Placement(placement.mesh, Strategy(s.dp, s.tp, s.pp, zero=zero, virtual_stages=s.virtual_stages))


@lru_cache(maxsize=8192)
def _traffic(shape: ModelShape, src: Placement, dst: Placement) -> Traffic:
    size = max(src.mesh.ranks[-1], dst.mesh.ranks[-1]) + 1
    rows, holders, wanting = _rows(shape, src, dst)
    return _Counter(rows, holders, wanting, size, src.mesh.gpus_per_node).traffic()


# ---------------------------------------------------------------------- counting turns


@dataclass(frozen=True)
class _Row:
    """A part of all parameters of a class: its number in the class, its units, the class's kinds."""

    index: int
    units: int
    kinds: Sequence[tuple[Kind, int]]


class _Turns:
    """Turns first .. first + count - 1 of `ranks` ranks that take them round and round, by group."""

    def __init__(self, first: Ints, count: Ints, ranks: Ints) -> None:
        self._whole, self._rest = np.divmod(count, ranks)
        self._start, self._ranks = first % ranks, ranks

    def of(self, group: Ints, place: Ints) -> Ints:
        """How many fall to the rank at `place` of `group`, element by element."""
        if not self._rest.any():  # as with powers of two
            return self._whole[group]
        after = place - self._start[group]
        after += self._ranks[group] * (after < 0)
        counted: Ints = self._whole[group] + (after < self._rest[group])
        return counted


def _places(lengths: Ints) -> Ints:
    """0, 1, .. within each of consecutive groups of these lengths."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _numbered(sizes: Ints, group: Ints) -> tuple[Ints, Ints]:
    """The groups that are not empty, and for each element the number of its group among them."""
    present = np.flatnonzero(sizes)
    number = np.zeros(len(sizes), dtype=np.int64)
    number[present] = np.arange(len(present))
    return present, number[group]


class _Counter:
    """Counts for rows of parts; `holders` and `wanting` are each row's sorted ranks."""

    def __init__(
        self, rows: Sequence[_Row], holders: Sequence[Ints], wanting: Sequence[Ints], size: int, per_node: int
    ) -> None:
        self._rows, self._size = rows, size
        nodes = self._nodes = -(-size // per_node)
        self._num_holders = np.array([len(ranks) for ranks in holders], dtype=np.int64)
        self._holder = np.concatenate(holders)
        self._holder_row = np.repeat(np.arange(len(rows)), self._num_holders)
        want_row = np.repeat(np.arange(len(rows)), [len(ranks) for ranks in wanting])
        wanted = np.concatenate(wanting)
        holds = np.zeros(len(rows) * size, dtype=bool)
        holds[self._holder_row * size + self._holder] = True
        lacking = ~holds[want_row * size + wanted]
        self._receiver, self._receiver_row = wanted[lacking], want_row[lacking]
        # groups: the ranks of one node in one row
        self._holder_group = self._holder_row * nodes + self._holder // per_node
        self._receiver_group = self._receiver_row * nodes + self._receiver // per_node
        self._near = np.bincount(self._holder_group, minlength=len(rows) * nodes)
        self._receivers = np.bincount(self._receiver_group, minlength=len(rows) * nodes)
        takes = self._receivers > 0
        far = (takes & (self._near == 0)).reshape(-1, nodes)
        self._far_nodes = far.sum(axis=1)
        self._gateways = np.where(far, self._receivers.reshape(-1, nodes), 0).max(axis=1)
        self._near_holders = np.where(takes, self._near, 0).reshape(-1, nodes).max(axis=1)
        self._index = np.array([row.index for row in rows])

    def traffic(self) -> Traffic:
        size = self._size
        sent, received = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        sent_far, received_far = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        if not len(self._receiver):
            return Traffic(*map(_frozen, (sent, received, sent_far, received_far)))
        far_place = _places(self._num_holders)
        near_place = _places(self._near[self._near > 0])
        group_place = _places(self._receivers[self._receivers > 0])
        # only groups with ranks: their numbers, and each rank's group among them
        near_groups, near = _numbered(self._near, self._holder_group)
        groups, members = _numbered(self._receivers, self._receiver_group)
        near_row, group_row = near_groups // self._nodes, groups // self._nodes
        near_sends = self._receivers[near_groups]
        by_far, by_near = np.zeros(len(near), dtype=np.int64), np.zeros(len(near), dtype=np.int64)
        passed = np.zeros(len(members), dtype=np.int64)
        first, step, total = self._turn_tables()
        for turn, size_of, count in zip(first, step, total, strict=True):
            index, far = self._index, self._far_nodes
            turns = _Turns(turn * far + index, count * far, self._num_holders)
            by_far += size_of[self._holder_row] * turns.of(self._holder_row, far_place)
            turns = _Turns(
                turn[near_row] * near_sends + index[near_row],
                count[near_row] * near_sends,
                self._near[near_groups],
            )
            by_near += size_of[self._holder_row] * turns.of(near, near_place)
            turns = _Turns(turn[group_row] + index[group_row], count[group_row], self._receivers[groups])
            passed += size_of[self._receiver_row] * turns.of(members, group_place)
        passed *= (self._near[groups] == 0)[members]
        whole = sum(size_of * count for size_of, count in zip(step, total, strict=True))
        _add(sent_far, self._holder, by_far)
        _add(sent, self._holder, by_far + by_near)
        _add(sent, self._receiver, passed * (self._receivers[groups] - 1)[members])
        _add(received_far, self._receiver, passed)
        _add(received, self._receiver, np.asarray(whole)[self._receiver_row])
        return Traffic(*map(_frozen, (sent, received, sent_far, received_far)))

    def _turn_tables(self) -> tuple[Ints, Ints, Ints]:
        """By kind and row: the first turn, the elements of a piece, the number of turns."""
        kinds = max(len(row.kinds) for row in self._rows)
        table = np.zeros((3, kinds, len(self._rows)), dtype=np.int64)
        counts = zip(
            self._far_nodes.tolist(),
            self._num_holders.tolist(),
            self._gateways.tolist(),
            self._near_holders.tolist(),
            strict=True,
        )
        for r, (row, of_row) in enumerate(zip(self._rows, counts, strict=True)):
            turn = 0
            for k, (kind, count) in enumerate(row.kinds):
                pieces = num_pieces(count, kind, row.units, *of_row)
                table[:, k, r] = turn, kind.unit_elements * row.units // pieces, count * pieces
                turn += count * pieces
        return table[0], table[1], table[2]


def _add(totals: Ints, ranks: Ints, elements: Ints) -> None:
    # exact: float64 holds whole numbers up to 2^53
    totals += np.bincount(ranks, elements, minlength=len(totals)).astype(np.int64)


def _frozen(values: Ints) -> Ints:
    values.flags.writeable = False
    return values


# ---------------------------------------------------------------------- classes of two placements

_Cells = tuple[Cell | None, ...]
"""Scaled boxes of the shards of a stage: tensor shards, each in its ZeRO parts; None where empty."""
_Pattern = tuple[_Cells, _Cells]


def _rows(shape: ModelShape, src: Placement, dst: Placement) -> tuple[list[_Row], list[Ints], list[Ints]]:
    """The parts of all classes with the ranks that hold and want them."""
    before, after = src.strategy, dst.strategy
    pairs = _stage_pairs(shape, before.pp, before.virtual_stages, after.pp, after.virtual_stages)
    classes: dict[tuple[_Pattern, tuple[int, ...], tuple[int, ...]], dict[Kind, int]] = {}
    for spec, alike in _specs(shape):
        kind, pattern = _cut(spec, *_shards(before), *_shards(after))
        stages = (
            {(_ends(spec, before.pp), _ends(spec, after.pp)): 1}
            if spec.layer is None
            else {((a,), (b,)): layers for (a, b), layers in pairs.items()}
        )
        for (old, new), layers in stages.items():
            counts = classes.setdefault((pattern, old, new), {})
            counts[kind] = counts.get(kind, 0) + layers * alike
    rows, holders, wanting = [], [], []
    ranks: dict[tuple[bool, tuple[int, ...], _Cells], list[Ints]] = {}
    for (pattern, old, new), counts in classes.items():
        kinds = sorted(counts.items(), reverse=True)
        ours, theirs, parts = _overlaid(pattern)
        held = ranks.get((True, old, pattern[0]))
        if held is None:
            held = ranks[True, old, pattern[0]] = _ranks(src, old, ours)
        wants = ranks.get((False, new, pattern[1]))
        if wants is None:
            wants = ranks[False, new, pattern[1]] = _ranks(dst, new, theirs)
        for index, part in enumerate(parts):
            rows.append(_Row(index, part.units, kinds))
            holders.append(_union([held[i] for i in part.holding]))
            wanting.append(_union([wants[i] for i in part.wanting]))
    return rows, holders, wanting


def _union(ranks: Sequence[Ints]) -> Ints:
    return ranks[0] if len(ranks) == 1 else np.sort(np.concatenate(ranks))


@lru_cache(maxsize=64)
def _specs(shape: ModelShape) -> Sequence[tuple[ParamSpec, int]]:
    """One parameter of each kind of a layer with how many a layer has, and all that are of no layer."""
    alike: dict[tuple[tuple[int, ...], int | None, int], list[ParamSpec]] = {}
    for spec in parameters(shape):
        if spec.layer == 0:
            alike.setdefault((spec.shape, spec.tp_dim, spec.unit), []).append(spec)
    rest = [(spec, 1) for spec in parameters(shape) if spec.layer is None]
    return [(specs[0], len(specs)) for specs in alike.values()] + rest


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


def _shards(strategy: Strategy) -> tuple[int, int]:
    """Tensor shards, and the parts that ZeRO 3 makes of each."""
    return strategy.tp, strategy.dp if strategy.zero == 3 else 1


@lru_cache(maxsize=4096)
def _cut(spec: ParamSpec, tp: int, parts: int, new_tp: int, new_parts: int) -> tuple[Kind, _Pattern]:
    """The scaled box of every shard before and after."""
    ours, theirs = _shard_boxes(spec, tp, parts), _shard_boxes(spec, new_tp, new_parts)
    scale = scale_of([box for box in (*ours, *theirs) if box is not None])

    def down(boxes: Iterable[Box | None]) -> _Cells:
        return tuple(None if box is None else scale.down(box) for box in boxes)

    return scale.kind, (down(ours), down(theirs))


def _shard_boxes(spec: ParamSpec, tp: int, parts: int) -> Sequence[Box | None]:
    shards = [shard_box(spec, tp, i) for i in range(tp)]
    if parts == 1:
        return shards
    whole = [{spec.name: box} for box in shards]
    return [zero_boxes(boxes, parts, i).get(spec.name) for boxes in whole for i in range(parts)]


_Shards = tuple[tuple[int, ...], ...]
"""For each distinct cell, ascending, the shards that have it."""


@lru_cache(maxsize=4096)
def _overlaid(pattern: _Pattern) -> tuple[_Shards, _Shards, tuple[Part, ...]]:
    distinct = []
    for cells in pattern:
        by_cell: dict[Cell, list[int]] = {}
        for shard, cell in enumerate(cells):
            if cell is not None:
                by_cell.setdefault(cell, []).append(shard)
        distinct.append(by_cell)
    src, dst = (tuple(sorted(by_cell)) for by_cell in distinct)
    ours, theirs = (tuple(tuple(by_cell[c]) for c in sorted(by_cell)) for by_cell in distinct)
    return ours, theirs, overlay(src, dst)


def _ends(spec: ParamSpec, pp: int) -> tuple[int, ...]:
    """The stages of a parameter that belongs to no layer."""
    first = {0} if spec.on_first else set()
    return tuple(sorted(first | ({pp - 1} if spec.on_last else set())))


def _ranks(placement: Placement, stages: Sequence[int], shards: _Shards) -> list[Ints]:
    """Which ranks of these stages have which cell, given the shards that have it."""
    s = placement.strategy
    grid = placement.mesh.first + np.arange(s.size).reshape(s.pp, s.dp, s.tp)[list(stages)]
    _, parts = _shards(s)
    if parts > 1:  # shard t * parts + d
        columns = grid.transpose(2, 1, 0).reshape(-1, len(stages))
    else:
        columns = grid.transpose(2, 0, 1).reshape(s.tp, -1)
    return [
        columns[of_cell[0]] if len(of_cell) == 1 else np.sort(columns[list(of_cell)].reshape(-1))
        for of_cell in shards
    ]
