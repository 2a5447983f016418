"""Constraints: what a user forbids a plan to do, clause by clause.

    constraints:
      reserve: [node1, "node0:gpu[0-3]"]            # no call runs on these GPUs
      all: {tp: {max: 4}, offload: false}           # every call that has a use for the field
      roles: {actor: {pp: 1}}
      calls:
        actor_gen: {mesh: node0, forbid: [d8t1p1, {tp: 2, pp: 2}]}
        actor_train: {recompute: full, zero: [1, 3]}

A field takes a value, a list of values, or `{min: ..., max: ...}`. `mesh` takes a mesh or a list of
them. An entry of `forbid` is a short strategy, or fields that must not all hold at once.

Decides which placements are allowed and which clauses contradict each other. Knows nothing of
costs, memory or search; meshes are read when the cluster is known, since it may be given later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realloc.dataflow import DataflowGraph
from realloc.errors import InputError
from realloc.files import Reader, nearest
from realloc.strategy import Recompute, Schedule, Strategy, parse_strategy, uses

DEGREES = ("dp", "tp", "pp")
_LEAST: Mapping[str, int] = {"dp": 1, "tp": 1, "pp": 1, "micro_batches": 1, "zero": 0, "virtual_stages": 1}
_CHOICES: Mapping[str, tuple[str, ...]] = {"schedule": tuple(Schedule), "recompute": tuple(Recompute)}
FIELDS = tuple(vars(Strategy()))


@dataclass(frozen=True)
class Allowed:
    """The values of one strategy field that a clause allows: `values`, or from `least` to `most`."""

    field: str
    values: tuple[Any, ...] = ()
    least: int | None = None
    most: int | None = None

    def __contains__(self, value: Any) -> bool:
        if self.values:
            return value in self.values
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def holds(self, strategy: Strategy) -> bool:
        return getattr(strategy, self.field) in self

    @property
    def content(self) -> Any:
        """As it stands in a file."""
        if not self.values:
            bounds = {"min": self.least, "max": self.most}
            return {key: bound for key, bound in bounds.items() if bound is not None}
        values = [str(v) if self.field in _CHOICES else v for v in self.values]
        return values[0] if len(values) == 1 else values

    def __str__(self) -> str:
        if not self.values:
            return f"{self.field} {{{', '.join(f'{key}: {bound}' for key, bound in self.content.items())}}}"
        words = [str(v).lower() if isinstance(v, bool) else str(v) for v in self.values]
        return f"{self.field} {words[0] if len(words) == 1 else '[' + ', '.join(words) + ']'}"


Forbidden = tuple[Allowed, ...]
"""Fields that must not all hold at once."""


@dataclass(frozen=True)
class Rule:
    """What one entry of `all`, `roles` or `calls` says. `meshes` are texts; none: any mesh."""

    meshes: tuple[str, ...] = ()
    fields: tuple[Allowed, ...] = ()
    forbid: tuple[Forbidden | Strategy, ...] = ()


@dataclass(frozen=True)
class Constraints:
    """The `constraints` section of an experiment; without any it allows everything."""

    reserve: tuple[str, ...] = ()
    every: Rule = Rule()
    roles: tuple[tuple[str, Rule], ...] = ()
    calls: tuple[tuple[str, Rule], ...] = ()

    def rules(self, graph: DataflowGraph, call: str) -> Iterator[tuple[str, Rule]]:
        """(where it stands, rule) of everything that concerns a call, the general first."""
        role = graph.by_name[call].role
        yield "all", self.every
        yield from ((f"roles.{name}", rule) for name, rule in self.roles if name == role)
        yield from ((f"calls.{name}", rule) for name, rule in self.calls if name == call)

    def check(self, graph: DataflowGraph, where: str) -> None:
        """Raises InputError for unknown roles and calls, and for fields that a call has no use for."""
        for kind, rules, known in (
            ("roles", self.roles, tuple(graph.roles)),
            ("calls", self.calls, tuple(graph.by_name)),
        ):
            for name, _ in rules:
                if name not in known:
                    raise InputError(
                        f"{where}.{kind}: the experiment has no {kind[:-1]} '{name}'.{nearest(name, known)}"
                    )
        for name, rule in self.calls:
            call_kind = graph.by_name[name].kind
            for allowed in rule.fields:
                if not uses(call_kind, allowed.field):
                    raise InputError(
                        f"{where}.calls.{name}.{allowed.field}: a {call_kind} call has no use for it; "
                        f"leave it out."
                    )


NO_CONSTRAINTS = Constraints()


def parse_constraints(reader: Reader) -> Constraints:
    """Reads a `constraints` section. Raises InputError."""
    every = reader.optional_child("all")
    constraints = Constraints(
        reserve=_texts(reader, "reserve"),
        every=Rule() if every is None else _parse_rule(every),
        roles=_parse_rules(reader, "roles"),
        calls=_parse_rules(reader, "calls"),
    )
    reader.done()
    return constraints


def _parse_rules(reader: Reader, key: str) -> tuple[tuple[str, Rule], ...]:
    child = reader.optional_child(key)
    return () if child is None else tuple((name, _parse_rule(child.child(name))) for name in child.keys())


def _parse_rule(reader: Reader) -> Rule:
    meshes = _texts(reader, "mesh")
    fields = _parse_fields(reader)
    forbid: list[Forbidden | Strategy] = []
    for index, entry in enumerate(_list(reader, "forbid")):
        where = f"{reader.at('forbid')}[{index}]"
        if isinstance(entry, str):
            forbid.append(parse_strategy(entry, where))
            continue
        child = Reader(entry, where)
        forbid.append(_parse_fields(child))
        child.done()
        if not forbid[-1]:
            raise InputError(f"{where}: forbids nothing: it has no fields.")
    reader.done()
    return Rule(meshes, fields, tuple(forbid))


def _parse_fields(reader: Reader) -> tuple[Allowed, ...]:
    for field in FIELDS:
        reader.raw(field, None)  # known keys, for the message about an unknown one
    return tuple(_parse_allowed(reader, field) for field in FIELDS if reader.has(field))


def _parse_allowed(reader: Reader, field: str) -> Allowed:
    value = reader.raw(field)
    if isinstance(value, Mapping):
        child = reader.child(field)
        if field not in _LEAST:
            raise InputError(f"{child.where}: is not a number; give a value or a list of values.")
        least = child.integer("min", None, minimum=_LEAST[field])
        most = child.integer("max", None, minimum=_LEAST[field])
        child.done()
        if least is None and most is None:
            raise InputError(f"{child.where}: give min, max or both.")
        if least is not None and most is not None and least > most:
            raise InputError(f"{child.where}: min {least} exceeds max {most}.")
        return Allowed(field, least=least, most=most)
    values: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        one = Reader({field: item}, reader.where)
        if field in _LEAST:
            maximum = 3 if field == "zero" else None
            values.append(one.integer(field, minimum=_LEAST[field], maximum=maximum))
        elif field in _CHOICES:
            kind = Schedule if field == "schedule" else Recompute
            values.append(kind(one.choice(field, _CHOICES[field])))
        else:
            values.append(one.get(field, bool))
    if not values:
        raise InputError(f"{reader.at(field)}: the list is empty: no value would be allowed.")
    return Allowed(field, tuple(values))


def _list(reader: Reader, key: str) -> Sequence[Any]:
    value = reader.raw(key, None)
    if value is None:
        return ()
    return value if isinstance(value, list) else [value]


def _texts(reader: Reader, key: str) -> tuple[str, ...]:
    """One mesh or a list of them, still as text."""
    return tuple(Reader({key: item}, reader.where).get(key, str) for item in _list(reader, key))


def constraints_content(constraints: Constraints) -> Mapping[str, Any]:
    """The section as a mapping that `parse_constraints` reads back to an equal value."""
    content: dict[str, Any] = {}
    if constraints.reserve:
        content["reserve"] = list(constraints.reserve)
    if constraints.every != Rule():
        content["all"] = _rule_content(constraints.every)
    for key, rules in (("roles", constraints.roles), ("calls", constraints.calls)):
        if rules:
            content[key] = {name: _rule_content(rule) for name, rule in rules}
    return content


def _rule_content(rule: Rule) -> Mapping[str, Any]:
    content: dict[str, Any] = {}
    if rule.meshes:
        content["mesh"] = rule.meshes[0] if len(rule.meshes) == 1 else list(rule.meshes)
    content |= {allowed.field: allowed.content for allowed in rule.fields}
    if rule.forbid:
        content["forbid"] = [
            str(entry) if isinstance(entry, Strategy) else {a.field: a.content for a in entry}
            for entry in rule.forbid
        ]
    return content
