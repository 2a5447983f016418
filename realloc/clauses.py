"""Constraints of an experiment on a given cluster: which clause refuses which placement.

Decides what a clause means for each call, and proves that the clauses of a call can hold together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations, product
from typing import Any, Protocol

from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.constraints import DEGREES, Allowed, Constraints, Rule
from realloc.dataflow import CallKind, DataflowGraph
from realloc.errors import InfeasibleError
from realloc.mesh import DeviceMesh, parse_mesh
from realloc.strategy import Strategy, inconsistent, uses


class _Test(Protocol):
    def __call__(self, placement: Placement) -> bool: ...


@dataclass(frozen=True)
class _On:
    """The mesh is one of these."""

    meshes: tuple[DeviceMesh, ...]

    def __call__(self, placement: Placement) -> bool:
        return placement.mesh in self.meshes


@dataclass(frozen=True)
class _Off:
    """The mesh leaves these GPUs alone."""

    mesh: DeviceMesh

    def __call__(self, placement: Placement) -> bool:
        return not placement.mesh.overlaps(self.mesh)


@dataclass(frozen=True)
class _Field:
    allowed: Allowed

    def __call__(self, placement: Placement) -> bool:
        return self.allowed.holds(placement.strategy)


@dataclass(frozen=True)
class _NotAll:
    """Not all of these fields hold at once."""

    fields: tuple[Allowed, ...]

    def __call__(self, placement: Placement) -> bool:
        return not all(allowed.holds(placement.strategy) for allowed in self.fields)


@dataclass(frozen=True)
class _Not:
    strategy: Strategy

    def __call__(self, placement: Placement) -> bool:
        return placement.strategy != self.strategy


@dataclass(frozen=True)
class Clause:
    """One thing that the constraints say about one call. `text` as in `calls.actor_gen.tp {max: 4}`."""

    text: str
    allows: _Test

    @property
    def is_about_meshes(self) -> bool:
        return isinstance(self.allows, (_On, _Off))

    @property
    def pinned(self) -> Sequence[DeviceMesh]:
        """The meshes that it asks for."""
        return self.allows.meshes if isinstance(self.allows, _On) else ()

    def values(self, field: str) -> Sequence[Any]:
        """The values of a field that it asks for, bounds included."""
        if not isinstance(self.allows, _Field) or self.allows.allowed.field != field:
            return ()
        allowed = self.allows.allowed
        return allowed.values or [end for end in (allowed.least, allowed.most) if end is not None]

    def requires(self, field: str, value: object) -> bool:
        """Whether it allows of a field this value alone."""
        return self.values(field) == (value,)


class Clauses:
    """The clauses of every call. Raises InfeasibleError when clauses of a call contradict each other."""

    def __init__(
        self, constraints: Constraints, graph: DataflowGraph, cluster: Cluster, where: str = "constraints"
    ) -> None:
        self._where = where
        where_reserved = f"{where}.reserve"
        reserved = [parse_mesh(text, cluster, where_reserved) for text in dict.fromkeys(constraints.reserve)]
        self._of: dict[str, tuple[Clause, ...]] = {}
        for call in graph.calls:
            clauses = [Clause(f"reserve {mesh}", _Off(mesh)) for mesh in reserved]
            for at, rule in constraints.rules(graph, call.name):
                clauses += self._clauses(at, rule, call.kind, cluster)
            self._of[call.name] = tuple(clauses)
            self._check(call.name, call.kind, clauses, cluster)

    def _clauses(self, at: str, rule: Rule, kind: CallKind, cluster: Cluster) -> list[Clause]:
        found = []
        if rule.meshes:
            meshes = tuple(parse_mesh(text, cluster, f"{self._where}.{at}.mesh") for text in rule.meshes)
            found.append(Clause(f"{at}.mesh {' or '.join(map(str, meshes))}", _On(meshes)))
        found += [
            Clause(f"{at}.{allowed}", _Field(allowed)) for allowed in rule.fields if uses(kind, allowed.field)
        ]
        for entry in rule.forbid:
            if isinstance(entry, Strategy):
                found.append(Clause(f"{at}.forbid {entry}", _Not(entry)))
            elif all(uses(kind, allowed.field) for allowed in entry):
                fields = ", ".join(map(str, entry))
                found.append(Clause(f"{at}.forbid {{{fields}}}", _NotAll(entry)))
        return found

    def of(self, call: str) -> Sequence[Clause]:
        return self._of[call]

    def refuses(self, call: str, placement: Placement) -> str | None:
        """The first clause that refuses a placement, as text; None when it is allowed."""
        for clause in self._of[call]:
            if not clause.allows(placement):
                return clause.text
        return None

    def allows(self, call: str, placement: Placement) -> bool:
        return self.refuses(call, placement) is None

    def _check(self, call: str, kind: CallKind, clauses: Sequence[Clause], cluster: Cluster) -> None:
        if not clauses:
            return
        possible = list(_possible(kind, clauses, cluster))
        if any(all(clause.allows(placement) for clause in clauses) for placement in possible):
            return
        for number in (1, 2, 3):
            for some in combinations(clauses, number):
                if not any(all(clause.allows(p) for clause in some) for p in possible):
                    raise InfeasibleError(f"{self._where}: {call}: {_contradiction(some)}")
        raise InfeasibleError(f"{self._where}: {call}: {_contradiction(clauses)}")


def _contradiction(clauses: Sequence[Clause]) -> str:
    texts = [clause.text for clause in clauses]
    if len(texts) == 1:
        return f"{texts[0]} leaves nothing to choose; loosen it."
    return f"{', '.join(texts[:-1])} and {texts[-1]} contradict each other; loosen one of them."


def _possible(kind: CallKind, clauses: Sequence[Clause], cluster: Cluster) -> Iterable[Placement]:
    """Placements that stand for all that the clauses may tell apart, models aside."""
    named: dict[str, set[int]] = {}
    for clause in clauses:
        test = clause.allows
        fields: Sequence[Allowed] = ()
        if isinstance(test, _Field):
            fields = (test.allowed,)
        elif isinstance(test, _NotAll):
            fields = test.fields
        for allowed in fields:
            ends = [v for v in (*allowed.values, allowed.least, allowed.most) if type(v) is int]
            named.setdefault(allowed.field, set()).update(ends)
    others = _variants(named)
    for mesh in _meshes(clauses, cluster):
        for dp, tp, pp in _degrees(mesh, kind):
            for other in others:
                strategy = replace(other, dp=dp, tp=tp, pp=pp)
                if inconsistent(strategy) is None:
                    yield Placement(mesh, strategy)


def _meshes(clauses: Sequence[Clause], cluster: Cluster) -> Sequence[DeviceMesh]:
    """The pinned meshes; then of every size (runs of nodes: powers of two) the first one, and a free one."""
    pins = [mesh for clause in clauses if isinstance(clause.allows, _On) for mesh in clause.allows.meshes]
    reserved = [clause.allows.mesh for clause in clauses if isinstance(clause.allows, _Off)]
    node = cluster.gpus_per_node
    nodes = {1 << k for k in range(cluster.num_nodes.bit_length())} | {cluster.num_nodes}
    found = dict.fromkeys(pins)
    for size in [d for d in range(1, node) if node % d == 0] + [count * node for count in sorted(nodes)]:
        starts = range(0, cluster.num_gpus - size + 1, min(size, node))
        every = (DeviceMesh(first, size, node) for first in starts)
        free = next((mesh for mesh in every if not any(mesh.overlaps(r) for r in reserved)), None)
        found |= {DeviceMesh(0, size, node): None} | ({} if free is None else {free: None})
    return tuple(found)


def _degrees(mesh: DeviceMesh, kind: CallKind) -> Sequence[tuple[int, int, int]]:
    if kind is CallKind.COMPUTE:
        return [(mesh.size, 1, 1)]
    sizes = [d for d in range(1, mesh.size + 1) if mesh.size % d == 0]
    return [(mesh.size // (tp * pp), tp, pp) for tp in sizes for pp in sizes if mesh.size % (tp * pp) == 0]


def _variants(named: Mapping[str, set[int]]) -> Sequence[Strategy]:
    """Every combination of the fields that clauses name; the others' defaults contradict nothing.

    But for interleaving and virtual stages, which go together.
    """
    names = set(named)
    if names & {"schedule", "virtual_stages"}:
        names |= {"schedule", "virtual_stages"}
    values: dict[str, Sequence[Any]] = {}
    for field, default in vars(Strategy()).items():
        if field in DEGREES or field not in names:
            values[field] = (default,)
        elif field == "zero":
            values[field] = range(4)
        elif isinstance(default, bool):
            values[field] = (False, True)
        elif isinstance(default, StrEnum):
            values[field] = tuple(type(default))
        else:
            values[field] = sorted({1, 2, *named.get(field, ())})
    return [Strategy(**dict(zip(values, row, strict=True))) for row in product(*values.values())]
