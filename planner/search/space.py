"""What branch and bound chooses from, as tables of numbers: candidates one by one, or many as one.

One by one, an item is a candidate with its variant that offloads: a plan in which a call keeps what it
could offload waits for no copies, so the variant counts only where memory asks for it. Many as one,
an item stands for all candidates of a call with one number of GPUs and, where its role is trained, one
layout: for the least that any of them takes, needs and covers. What is proven of items holds for
every choice of candidates that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

import numpy as np

from planner.costs import MoveCosts
from planner.problem import Problem
from planner.room import Bytes, Room
from planner.search.entries import Entry, entries_of
from planner.search.tree import Items, MovePrices
from planner.windows import Ints, Windows
from realloc.augmented import Placement

MOST_POSITIONS = 32
"""Above so many relative positions, moves between two kinds of meshes count as if they could lie anywhere."""


Placed = dict[tuple[int, int], list[Entry]]
"""(call, layout number) -> what has it."""


@dataclass(frozen=True)
class Space:
    """`members[call][item]`: the entries that an item stands for, fastest first."""

    items: Sequence[Items]
    members: Sequence[Sequence[Sequence[int]]]
    room: Room
    prices: MovePrices


class Spaces:
    """The spaces of one problem.

    `calls`: the order in which to decide calls. `num_first`: so many of them, the largest trained role's
    first ends of a move, are decided by kind before the others are looked at one by one.
    """

    def __init__(self, problem: Problem, *, others: bool = False) -> None:
        """`others`: with what a large cluster leaves out, for bounds alone."""
        self._problem = problem
        calls = problem.graph.calls
        self.windows = Windows(len(calls), problem.data_edges, problem.users, problem.cluster.num_gpus)
        names = [call.role or call.name for call in calls]
        self._groups = [names.index(name) for name in names]
        self._trained = {call for pair in problem.users for call in pair}
        self._moves = MoveCosts(problem.costs)
        self._entries = entries_of(problem, others=others)
        self.calls = self._calls()
        self.num_first = 2 if problem.users else 1

    def _calls(self) -> list[int]:
        """The order in which to decide calls: those that a move joins, then others, largest first."""
        rows = self._problem.rows
        area = [min(row[0] * (row[2] - row[1]) for row in table) for table in rows]
        joined = [
            call for pair in sorted(self._problem.users, key=lambda p: -area[p[1]]) for call in pair[::-1]
        ]
        others = sorted(range(len(rows)), key=lambda call: -area[call])
        return list(dict.fromkeys((*joined, *others)))

    @cached_property
    def one_by_one(self) -> Space:
        """Items are candidates, each with its variant that offloads."""
        keys = [
            {index: entry.without_offload for index, entry in enumerate(entries)} for entries in self._entries
        ]
        space = self._space(keys)
        return self._space(self._fastest(keys)) if space.room.always_fits else space

    def below(self, kinds: Space) -> list[list[Ints]]:
        """`[call][kind]`: the items of `one_by_one` that a kind stands for."""
        found = []
        for call, groups in enumerate(kinds.members):
            item_of = {
                index: item for item, members in enumerate(self.one_by_one.members[call]) for index in members
            }
            found.append(
                [
                    np.array(sorted({item_of[index] for index in group if index in item_of}), dtype=np.int32)
                    for group in groups
                ]
            )
        return found

    def only(self, space: Space, kept: Sequence[Ints]) -> Space:
        """The space with these items of each call alone."""
        items = [one.only(some) for one, some in zip(space.items, kept, strict=True)]
        members = [[groups[i] for i in some] for groups, some in zip(space.members, kept, strict=True)]
        bytes_ = [one.only(some) for one, some in zip(space.room.items, kept, strict=True)]
        return Space(items, members, self._room(items, bytes_), space.prices)

    def every_candidate(self) -> Space:
        """Item i of a call is its candidate i."""
        return self._space([{i: i for i in range(len(rows))} for rows in self._problem.rows])

    def many_as_one(self) -> Space:
        """Items are numbers of GPUs, and layouts where a role is trained."""
        return self._space(
            [
                {
                    index: entry.form if call in self._trained else (entry.size,)
                    for index, entry in enumerate(entries)
                }
                for call, entries in enumerate(self._entries)
            ],
            kinds=True,
        )

    def _fastest(self, keys: Sequence[dict[int, Hashable]]) -> list[dict[int, Hashable]]:
        """With memory to spare, the fastest of each mesh and layout: it hurts no order of nodes."""
        kept = []
        for entries, of in zip(self._entries, keys, strict=True):
            first: dict[Hashable, int] = {}
            for index in of:
                first.setdefault(entries[index].layout, index)
            kept.append({index: of[index] for index in first.values()})
        return kept

    def _space(self, keys: Sequence[dict[int, Hashable]], *, kinds: bool = False) -> Space:
        """Entries with equal keys become one item; `kinds`: of one form."""
        layouts: dict[Hashable, int] = {}
        placed: Placed = {}
        items, bytes_, members = [], [], []
        for call, of in enumerate(keys):
            groups: dict[Hashable, list[int]] = {}
            for index, key in of.items():
                groups.setdefault(key, []).append(index)
            entries = [[self._entries[call][index] for index in group] for group in groups.values()]
            layout = [
                layouts.setdefault(same[0].form if kinds else same[0].layout, len(layouts))
                for same in entries
            ]
            for number, same in zip(layout, entries, strict=True):
                placed.setdefault((call, number), []).extend(same)
            items.append(_items(entries, layout))
            bytes_.append(_bytes(entries, layout))
            members.append(list(groups.values()))
        prices = MovePrices(
            self.windows, items, partial(self._least_move_s, placed), partial(self._move_s, placed)
        )
        return Space(items, members, self._room(items, bytes_), prices)

    def _room(self, items: Sequence[Items], bytes_: Sequence[Bytes]) -> Room:
        return Room(
            bytes_,
            [item.sizes for item in items],
            [item.first for item in items],
            [item.stop for item in items],
            self._groups,
            self._problem.cluster.num_gpus,
            self._problem.capacity_bytes,
        )

    def _least_move_s(self, placed: Placed, user: int, layout: int, trainer_layout: int) -> float:
        """At most `_move_s`, without asking for what is exact."""
        return self._over_positions(placed, user, layout, trainer_layout, self._moves.least_reallocate_s)

    def _move_s(self, placed: Placed, user: int, layout: int, trainer_layout: int) -> float:
        """The least of all positions at both ends, where they are not too many."""
        return self._over_positions(placed, user, layout, trainer_layout, self._moves.reallocate_s)

    def _over_positions(
        self,
        placed: Placed,
        user: int,
        layout: int,
        trainer_layout: int,
        price: Callable[[str, Placement, Placement], float],
    ) -> float:
        """Positions that differ by whole nodes alone cost the same."""
        trainer = next(t for u, t in self._problem.users if u == user)
        role = str(self._problem.graph.calls[user].role)
        sources, targets = placed[trainer, trainer_layout], placed[user, layout]
        known = [[entry.placement for entry in entries if entry.is_known] for entries in (sources, targets)]
        found: dict[tuple[int, ...], tuple[Placement, Placement]] = {}
        for a, b in product(*known):
            (node_a, gpu_a), (node_b, gpu_b) = (divmod(p.mesh.first, p.mesh.gpus_per_node) for p in (a, b))
            found.setdefault((node_a - node_b, gpu_a, gpu_b), (a, b))
            if len(found) > MOST_POSITIONS:
                break
        if len(found) > MOST_POSITIONS or not all(known):
            return self._moves.least_anywhere_s(role, sources[0].placement, targets[0].placement)
        return min(price(role, a, b) for a, b in found.values())


def _items(entries: Sequence[Sequence[Entry]], layouts: Sequence[int]) -> Items:
    rows = [[entry.row for entry in group] for group in entries]
    return Items(
        np.array([min(row[0] for row in group) for group in rows]),
        np.array([group[0].size for group in entries], dtype=np.int32),
        np.array([max(row[1] for row in group) for group in rows], dtype=np.int32),
        np.array([min(row[2] for row in group) for group in rows], dtype=np.int32),
        np.array(layouts, dtype=np.int32),
    )


def _bytes(entries: Sequence[Sequence[Entry]], layouts: Sequence[int]) -> Bytes:
    """The least of each kind; what offload frees needs no room."""
    parameters, state, working = (
        np.array([min(entry.row[at] for entry in group) for group in entries], dtype=np.int64)
        for at in (7, 8, 9)
    )
    return Bytes(parameters, state, working, np.array(layouts, dtype=np.int32))
