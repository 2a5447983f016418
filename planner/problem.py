"""One search problem: candidates as tables of numbers, and the seconds of any choice of them.

A choice is one candidate index per call, in the graph's order of calls. Evaluating one builds the
same augmented graph as `realloc.augmented.augment`, but as numbers; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import inf
from typing import TypeVar

from planner.candidates import Candidate, CandidateSet
from planner.costs import Costs, Memory, MoveCosts
from planner.memory import worst_gpu
from planner.precedence import Precedence
from planner.rows import Row, call_order, load, version_cycles
from planner.simulator import precedence_of
from planner.structure import Schedule, Structure, best_order, steady_order
from realloc.augmented import (
    PARAMETERS,
    Placement,
    augment,
    copied_causes,
    load_name,
    offload_name,
    reallocation_name,
    residences,
    transfer_name,
)
from realloc.cluster import Cluster
from realloc.dataflow import CallKind, DataflowGraph
from realloc.experiment import Experiment

Choice = tuple[int, ...]
Key = TypeVar("Key")
_COPIED_AT_MOST = 4096


class Problem:
    """What every search method works on. Reads candidates and costs; caches, changes nothing."""

    def __init__(
        self,
        experiment: Experiment,
        graph: DataflowGraph,
        cluster: Cluster,
        costs: Costs,
        candidates: CandidateSet,
        capacity_bytes: int,
    ) -> None:
        self.experiment, self.graph, self.cluster = experiment, graph, cluster
        self.costs, self.capacity_bytes = costs, capacity_bytes
        self.candidate_set = candidates
        self.candidates: tuple[Sequence[Candidate], ...] = tuple(
            candidates.candidates[call.name] for call in graph.calls
        )
        # what is not looked at but counts for bounds: see `CandidateSet.others`
        self.others: tuple[Sequence[Candidate], ...] = tuple(
            candidates.others.get(call.name, ()) for call in graph.calls
        )
        self.evaluated = 0
        self._moves = MoveCosts(costs)
        self._index = {call.name: i for i, call in enumerate(graph.calls)}
        self._edges = [
            (self._index[src], self._index[dst], graph.values_read(dst, keys))
            for (src, dst), keys in graph.data_edges().items()
        ]
        # every (call, trainer) of a trained role, the trainer itself left out
        self.users = tuple(
            (self._index[call.name], self._index[trainer.name])
            for role in graph.roles
            if (trainer := graph.maker(role))
            for call in graph.calls_of(role)
            if call.kind is not CallKind.TRAIN_STEP
        )
        self._trainer_of = dict(self.users)
        self.data_edges = tuple((src, dst) for src, dst, _ in self._edges)
        self._layouts: dict[object, int] = {}
        self.rows: tuple[tuple[Row, ...], ...] = tuple(
            tuple(self.row(i, candidate) for candidate in candidates)
            for i, candidates in enumerate(self.candidates)
        )
        self.cycles = version_cycles(len(graph.calls), self._edges, self.users)
        self.call_order = call_order(len(graph.calls), self._edges, self.users)
        self._structures: dict[tuple[int, ...], Structure] = {}
        self._transfer_s: dict[tuple[int, int, int], float] = {}
        self._reallocate_s: dict[tuple[int, int, int], float] = {}
        self._copied: dict[tuple[int, ...], Structure] = {}
        self._copy_s: dict[tuple[int, int, tuple[str, ...]], float] = {}

    def row(self, call: int, candidate: Candidate) -> Row:
        placement, memory = candidate.placement, candidate.option.memory
        mesh, strategy = placement.mesh, placement.strategy
        role = self.graph.calls[call].role
        # a moving average is mixed anew even where it lies as what it follows
        average = role is not None and self.graph.average(role) is not None
        alike: object = (role, placement.layout_key) if average else placement.layout_key
        layout = self._layouts.setdefault(alike, len(self._layouts))
        single = -1
        if strategy.dp == strategy.pp == 1:
            single = self._layouts.setdefault(mesh, len(self._layouts))
        owner: object = call if role is None else (role, layout)
        parameters, state = memory.parameters, memory.gradients + memory.optimizer
        offload = strategy.offload
        return (
            candidate.option.seconds,
            mesh.first,
            mesh.first + mesh.size,
            ((1 << mesh.size) - 1) << mesh.first,
            layout,
            single,
            self._layouts.setdefault(("owner", owner), len(self._layouts)),
            0 if offload else parameters,
            0 if offload else state,
            candidate.option.working_bytes + (state if offload else 0),
            max(1, parameters) if offload else 0,
        )

    @cached_property
    def with_layout(self) -> tuple[Mapping[int, Sequence[int]], ...]:
        """For each call: layout -> the candidates that have it, fastest first."""
        return tuple(_grouped(row[4] for row in rows) for rows in self.rows)

    @cached_property
    def on_mesh(self) -> tuple[Mapping[tuple[int, int], Sequence[int]], ...]:
        """For each call: (first GPU, GPU after the last) -> the candidates there, fastest first."""
        return tuple(_grouped((row[1], row[2]) for row in rows) for rows in self.rows)

    def sharing(self, choice: Choice, call: int) -> list[int]:
        """The other calls of the call's role that use its layout in this choice."""
        key = self.rows[call][choice[call]][6]
        return [
            other
            for other, (table, index) in enumerate(zip(self.rows, choice, strict=True))
            if other != call and table[index][6] == key
        ]

    def placements(self, choice: Choice) -> dict[str, Placement]:
        return {name: self.candidates[i][choice[i]].placement for name, i in self._index.items()}

    def memory(self, choice: Choice) -> dict[str, Memory]:
        return {name: self.candidates[i][choice[i]].option.memory for name, i in self._index.items()}

    def peak_bytes(self, choice: Choice) -> int:
        """Bytes of the GPU that needs most (see `planner.memory`)."""
        rows = [table[c] for table, c in zip(self.rows, choice, strict=True)]
        if any(row[10] for row in rows):
            order = self.schedule(choice).order
            return worst_gpu(self.graph, self.placements(choice), self.memory(choice), order).total_bytes
        return max(load(rows, row[1])[0] for row in rows)

    def overflow_bytes(self, choice: Choice) -> int:
        """Bytes above the capacity, summed over the first GPUs of the meshes; 0 when it fits.

        With offload only a lower bound: what is loaded for one call may meet what another needs.
        """
        rows = [table[c] for table, c in zip(self.rows, choice, strict=True)]
        firsts = {row[1] for row in rows}
        return sum(max(0, load(rows, gpu)[0] - self.capacity_bytes) for gpu in firsts)

    def evaluate(self, choice: Choice, limit_s: float = inf, *, hasty: bool = False) -> float:
        """Steady seconds per iteration of a choice; inf when it does not fit in memory.

        May return inf without simulating when the calls alone prove that it takes at least `limit_s`.
        `hasty` also gives up when it takes that long with reallocations that were never priced at the
        least they may take: pricing one can take a hundred times as long as all the rest. Nearly always
        right, but no proof, since cheaper nodes can lead to a worse order.
        """
        self.evaluated += 1
        rows = [table[c] for table, c in zip(self.rows, choice)]  # noqa: B905 (hot)
        if not self._possible(rows, limit_s):
            return inf
        structure = self._structure(rows, choice)
        if hasty and limit_s < inf and self._unpriced(structure, rows):
            seconds, masks = self._priced(structure, rows, choice, least=True)
            if steady_order(structure, seconds, masks)[0] >= limit_s:
                return inf
        seconds, masks = self._priced(structure, rows, choice)
        if structure.graph is not None:
            return self._copied_orders(structure, seconds, masks, choice, limit_s)[0]
        return steady_order(structure, seconds, masks)[0]

    def schedule(self, choice: Choice) -> Schedule:
        """The order and the seconds of every node behind `evaluate`."""
        rows = [table[c] for table, c in zip(self.rows, choice, strict=True)]
        structure = self._structure(rows, choice)
        seconds, masks = self._priced(structure, rows, choice)
        names = [self._name(slot) for slot in structure.slots]
        if structure.graph is not None:
            spent, placed = self._copied_orders(structure, seconds, masks, choice)
            return Schedule(spent, placed, dict(zip(names, seconds, strict=True)))
        spent, order = steady_order(structure, seconds, masks)
        return Schedule(spent, tuple(names[i] for i in order), dict(zip(names, seconds, strict=True)))

    def _possible(self, rows: Sequence[Row], limit_s: float) -> bool:
        """Whether the choice fits in memory and its calls alone may take less than `limit_s`.

        Only the first GPU of each mesh is looked at: some such GPU runs all the calls that any other
        GPU runs. Calls on a cycle through a parameter version follow each other in any case.
        """
        for cycle in self.cycles:
            total = 0.0
            for i in cycle:
                total += rows[i][0]
            if total >= limit_s:
                return False
        seen = []
        for row in rows:
            if row[1] not in seen:
                seen.append(row[1])
                size, busy = load(rows, row[1])
                if size > self.capacity_bytes or busy >= limit_s:
                    return False
        return True

    def _structure(self, rows: Sequence[Row], choice: Choice) -> Structure:
        """The nodes and edges that the placements imply."""
        for row in rows:
            if row[10]:
                return self._copied_structure(rows, choice)
        signature = []
        for src, dst, _ in self._edges:
            signature.append(1 if rows[src][5] < 0 or rows[src][5] != rows[dst][5] else 0)
        first: dict[tuple[int, int], int] = {}
        for user, trainer in self.users:
            layout = rows[user][4]
            if layout == rows[trainer][4]:
                signature.append(-1)
            else:
                signature.append(first.setdefault((trainer, layout), user))
        key = tuple(signature)
        found = self._structures.get(key)
        if found is None:
            found = self._structures[key] = self._build(key)
        return found

    def _build(self, signature: tuple[int, ...]) -> Structure:
        moved = signature[len(self._edges) :]
        count = len(self.graph.calls)
        slots: list[int] = []
        for call in self.call_order:
            slots += [count + e for e, (_, dst, _) in enumerate(self._edges) if dst == call and signature[e]]
            slots.append(call)
        base = count + len(self._edges)
        slots += [base + user for (user, _), source in zip(self.users, moved, strict=True) if source == user]
        node = {slot: i for i, slot in enumerate(slots)}
        edges: list[tuple[int, int, int]] = []
        for e, (src, dst, _) in enumerate(self._edges):
            if signature[e]:
                edges += [(node[src], node[count + e], 0), (node[count + e], node[dst], 0)]
            else:
                edges.append((node[src], node[dst], 0))
        for trainer in {trainer: None for _, trainer in self.users}:
            edges.append((node[trainer], node[trainer], 1))
        for (user, trainer), source in zip(self.users, moved, strict=True):
            if source < 0:
                edges += [(node[user], node[trainer], 0), (node[trainer], node[user], 1)]
                continue
            via = node[base + source]
            if source == user:
                edges.append((node[trainer], via, 0))
            edges += [(node[user], via, 0), (via, node[user], 1)]
        transfers = [i for i, slot in enumerate(slots) if 0 <= slot - len(self.rows) < len(self._edges)]
        moves = tuple(i for i, slot in enumerate(slots) if slot >= base)
        return Structure(tuple(slots), Precedence.of(len(slots), edges, transfers), moves)

    def _copied_structure(self, rows: Sequence[Row], choice: Choice) -> Structure:
        """With offload: from the augmented graph itself, for placements of these layouts."""
        key = tuple(value for row in rows for value in (row[4], row[5], 1 if row[10] else 0))
        found = self._copied.get(key)
        if found is None:
            graph = augment(self.graph, self.placements(choice))
            names = graph.default_order()
            slots = {self._name(slot): slot for slot in range(4 * len(rows) + len(self._edges) + len(rows))}
            if len(self._copied) >= _COPIED_AT_MOST:
                self._copied.clear()
            found = self._copied[key] = Structure(
                tuple(slots[name] for name in names),
                precedence_of(graph, names),
                graph=graph,
                absent=residences(self.graph, self.placements(choice)),
            )
        return found

    def _copied_orders(
        self,
        structure: Structure,
        seconds: Sequence[float],
        masks: Sequence[int],
        choice: Choice,
        limit_s: float = inf,
    ) -> tuple[float, tuple[str, ...]]:
        """Seconds and order of a choice with offload: see `best_order`."""
        placements, memory = self.placements(choice), self.memory(choice)

        def fits(order: Sequence[str]) -> bool:
            peak = worst_gpu(self.graph, placements, memory, order, structure.absent)
            return peak.total_bytes <= self.capacity_bytes

        overlaps = self.costs.overlaps_host_copies
        return best_order(structure, seconds, masks, fits, limit_s, overlaps_loads=overlaps)

    def _priced(
        self, structure: Structure, rows: Sequence[Row], choice: Choice, *, least: bool = False
    ) -> tuple[list[float], list[int]]:
        """Seconds and ranks of every node. `least`: reallocations not priced yet take the least they may."""
        count, base = len(rows), len(rows) + len(self._edges)
        seconds: list[float] = []
        masks: list[int] = []
        for slot in structure.slots:
            if slot < count:
                row = rows[slot]
                seconds.append(row[0])
                masks.append(row[3])
            elif slot < base:
                e = slot - count
                src, dst, keys = self._edges[e]
                a, b = rows[src], rows[dst]
                key = (e, a[4], b[4])
                spent = self._transfer_s.get(key)
                if spent is None:
                    ends = self._placed(src, choice), self._placed(dst, choice)
                    whole = self._moves.transfer_s(keys, *ends)
                    spent = self._transfer_s[key] = self.graph.calls[dst].share_of(whole)
                seconds.append(spent)
                masks.append(a[3] | b[3])
            elif slot >= base + count:
                call = (slot - base) % count
                seconds.append(self._host_copy_s(structure, slot, call, choice[call]))
                masks.append(rows[call][3])
            else:
                user = slot - base
                trainer = self._trainer_of[user]
                a, b = rows[trainer], rows[user]
                key = (user, a[4], b[4])
                spent = self._reallocate_s.get(key)
                if spent is None:
                    role = str(self.graph.calls[user].role)
                    ends = self._placed(trainer, choice), self._placed(user, choice)
                    if least:
                        spent = self._moves.least_reallocate_s(role, *ends)
                    else:
                        spent = self._reallocate_s[key] = self._moves.reallocate_s(role, *ends)
                seconds.append(spent)
                masks.append(a[3] | b[3])
        return seconds, masks

    def _host_copy_s(self, structure: Structure, slot: int, call: int, candidate: int) -> float:
        """Seconds of a load or offload."""
        assert structure.graph is not None
        causes = copied_causes(self.graph, structure.graph.by_name[self._name(slot)])
        key = (call, candidate, causes)
        found = self._copy_s.get(key)
        if found is None:
            placement = self.candidates[call][candidate].placement
            found = self._copy_s[key] = self.costs.host_copy_s(self.graph.calls[call], placement, causes)
        return found

    def _unpriced(self, structure: Structure, rows: Sequence[Row]) -> bool:
        """Whether a reallocation of the choice was never priced."""
        base = len(rows) + len(self._edges)
        for slot in structure.slots:
            if base <= slot < base + len(rows):
                user = slot - base
                key = (user, rows[self._trainer_of[user]][4], rows[user][4])
                if key not in self._reallocate_s:
                    return True
        return False

    def _placed(self, call: int, choice: Choice) -> Placement:
        return self.candidates[call][choice[call]].placement

    def _name(self, slot: int) -> str:
        calls = self.graph.calls
        if slot < len(calls):
            return calls[slot].name
        slot -= len(calls)
        if slot < len(self._edges):
            src, dst, _ = self._edges[slot]
            return transfer_name(calls[src].name, calls[dst].name)
        block, index = divmod(slot - len(self._edges), len(calls))
        role, name = str(calls[index].role), calls[index].name
        if block == 0:
            return reallocation_name(role, name)
        if block == 1:
            return load_name(role, name)
        return offload_name(role, name, PARAMETERS if block == 3 else "")


def _grouped(keys: Iterable[Key]) -> Mapping[Key, Sequence[int]]:
    """Key -> the positions at which it stands, in order."""
    found: dict[Key, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return found
