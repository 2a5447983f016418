"""Traces: what every instruction of every rank took, beside what was predicted.

A trace is JSON lines: a header `{"realloc": "trace/1", ...}`, then one record a line: what an
instruction took on a rank, or how long the sequences of an iteration were.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from realloc.errors import InputError
from realloc.files import VERSIONS, Reader


@dataclass(frozen=True)
class TraceRecord:
    """One instruction on one rank.

    Times are seconds since the start of the run's first iteration. `wait_s` is the part spent
    waiting for other ranks to arrive, before the instruction's own work began. `predicted_s` is
    None when the plan has no predictions. `sent_bytes` are bytes this rank sent to other ranks.
    `terms`: seconds of a call that were timed apart, waiting for peers included (see `realloc.comparison`);
    the rest of the call is compute. Empty where nothing is timed apart. `cpu_s`: for how long the rank's
    thread had a core. `peak_bytes`: the most that tensors took on its GPU meanwhile; 0 on hosts.
    """

    iteration: int
    rank: int
    node: str
    kind: str
    start_s: float
    end_s: float
    wait_s: float = 0.0
    predicted_s: float | None = None
    sent_bytes: int = 0
    tokens: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0
    peak_bytes: int = 0


Counts = tuple[tuple[int, int], ...]
"""(tokens, how many sequences have so many), shortest first."""


@dataclass(frozen=True)
class BatchLengths:
    """How long the sequences of one iteration were."""

    iteration: int
    prompt: Counts
    response: Counts


@dataclass(frozen=True)
class Machine:
    """What a run ran on: the name that profiles have for the device, and the cores that ranks share.

    `pinned`: every rank had a core of its own.
    """

    device: str
    cores: int
    pinned: bool = False


@dataclass(frozen=True)
class Trace:
    world_size: int
    records: tuple[TraceRecord, ...]
    lengths: tuple[BatchLengths, ...] = ()
    machine: Machine | None = None

    def steady(self, *, skip_iterations: int = 1) -> Sequence[TraceRecord]:
        """The records without those of the first iterations, unless there are no others."""
        first = min((r.iteration for r in self.records), default=0)
        last = max((r.iteration for r in self.records), default=0)
        if skip_iterations > last - first:
            return self.records
        return [r for r in self.records if r.iteration - first >= skip_iterations]

    def node_seconds(self, *, skip_iterations: int = 1) -> Mapping[str, float]:
        """Median over iterations of each node's longest time over ranks, waiting excluded.

        Of a call or transfer that runs in some iterations only (evaluation): its share of every iteration.
        The first iterations warm up and are skipped when there are others. (A resumed run's first
        iteration is not 0.)
        """
        longest: dict[tuple[str, int], float] = {}
        for record in self.steady(skip_iterations=skip_iterations):
            key = (record.node, record.iteration)
            longest[key] = max(longest.get(key, 0.0), own_seconds(record))
        times: dict[str, list[float]] = {}
        for (node, _), seconds in longest.items():
            times.setdefault(node, []).append(seconds)
        share = self.share_of_iterations(skip_iterations=skip_iterations)
        return {node: median(values) * share.get(node, 1.0) for node, values in times.items()}

    def share_of_iterations(self, *, skip_iterations: int = 1) -> Mapping[str, float]:
        """Call or transfer -> the share of iterations in which it ran."""
        steady = self.steady(skip_iterations=skip_iterations)
        every = {record.iteration for record in steady}
        ran = {(r.node, r.iteration) for r in steady if r.kind in ("call", "transfer")}
        counts = Counter(node for node, _ in ran)
        return {node: count / len(every) for node, count in counts.items()}

    def iteration_seconds(self, *, skip_iterations: int = 1) -> float:
        """Steady seconds per iteration: median distance between ends of successive iterations.

        Where some iterations have calls that others lack (evaluation), the mean of both kinds' medians.
        """
        each = self.each_iteration_s(skip_iterations=skip_iterations)
        calls: dict[int, set[str]] = {iteration: set() for iteration in each}
        for record in self.records:
            if record.kind == "call" and record.iteration in calls:
                calls[record.iteration].add(record.node)
        kinds: dict[frozenset[str], list[float]] = {}
        for iteration, seconds in each.items():
            kinds.setdefault(frozenset(calls[iteration]), []).append(seconds)
        return sum(median(alike) * len(alike) for alike in kinds.values()) / max(1, len(each))

    def each_iteration_s(self, *, skip_iterations: int = 1) -> Mapping[int, float]:
        """Iteration -> seconds from the end of the one before to its own, without those that warm up."""
        ends: dict[int, float] = {}
        for record in self.records:
            ends[record.iteration] = max(ends.get(record.iteration, 0.0), record.end_s)
        order = sorted(ends)
        gaps = {b: ends[b] - ends[a] for a, b in pairwise(order)}
        if not gaps:
            return {order[0]: ends[order[0]]} if order else {}
        steady = order[1:][max(0, skip_iterations - 1) :] or order[1:]
        return {iteration: gaps[iteration] for iteration in steady}


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def own_seconds(record: TraceRecord) -> float:
    """Seconds of a record, without those before its last rank arrived."""
    return record.end_s - record.start_s - record.wait_s


def counted(lengths: Iterable[int]) -> Counts:
    """Lengths as a trace keeps them."""
    return tuple(sorted(Counter(lengths).items()))


def trace_lines(
    world_size: int,
    records: Iterable[TraceRecord],
    lengths: Iterable[BatchLengths] = (),
    machine: Machine | None = None,
) -> Iterable[str]:
    """The lines of a trace file, header first."""
    header: dict[str, Any] = {"realloc": f"trace/{VERSIONS['trace']}", "world_size": world_size}
    if machine is not None:
        header["machine"] = asdict(machine)
    yield json.dumps(header)
    for item in lengths:
        yield json.dumps({"lengths": asdict(item)})
    for record in records:
        content = asdict(record)
        if not record.terms:
            del content["terms"]
        if not record.peak_bytes:
            del content["peak_bytes"]
        yield json.dumps(content)


def read_trace(path: str | Path) -> Trace:
    """Reads and validates a trace file. Raises InputError naming the line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None
    if not lines:
        raise InputError(f"{path}: is empty; a trace starts with its header line.")
    header = _json_line(path, 1, lines[0])
    found = header.raw("realloc", "")
    if found != f"trace/{VERSIONS['trace']}":
        raise InputError(f"{path}, line 1: is '{found}', expected trace/{VERSIONS['trace']}.")
    world_size = header.integer("world_size", minimum=1)
    machine = header.optional_child("machine")
    header.done()
    records: list[TraceRecord] = []
    lengths: list[BatchLengths] = []
    for number, line in enumerate(lines[1:], 2):
        if line:
            reader = _json_line(path, number, line)
            if reader.has("lengths"):
                lengths.append(_parse_lengths(reader.child("lengths")))
                reader.done()
            else:
                records.append(_parse(reader, world_size))
    found_machine = None if machine is None else _parse_machine(machine)
    return Trace(world_size, tuple(records), tuple(lengths), found_machine)


def _json_line(path: Path, number: int, line: str) -> Reader:
    where = f"{path}, line {number}"
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON.") from None
    return Reader(value, where)


def _parse(reader: Reader, world_size: int) -> TraceRecord:
    record = TraceRecord(
        iteration=reader.integer("iteration"),
        rank=reader.integer("rank", maximum=world_size - 1),
        node=reader.get("node", str),
        kind=reader.get("kind", str),
        start_s=reader.number("start_s"),
        end_s=reader.number("end_s"),
        wait_s=reader.number("wait_s", 0.0, minimum=0.0),
        predicted_s=reader.number("predicted_s", minimum=0.0) if reader.has("predicted_s") else None,
        sent_bytes=reader.integer("sent_bytes", 0),
        tokens=reader.integer("tokens", 0),
        terms=_parse_terms(reader.optional_child("terms")),
        cpu_s=reader.number("cpu_s", 0.0, minimum=0.0),
        peak_bytes=reader.integer("peak_bytes", 0, minimum=0),
    )
    reader.raw("predicted_s", None)
    reader.done()
    if record.end_s < record.start_s:
        raise InputError(f"{reader.where}: ends at {record.end_s} s, before its start at {record.start_s} s.")
    return record


def _parse_terms(reader: Reader | None) -> Mapping[str, float]:
    if reader is None:
        return {}
    terms = {name: reader.number(name, minimum=0.0) for name in reader.keys()}
    reader.done()
    return terms


def _parse_machine(reader: Reader) -> Machine:
    machine = Machine(
        reader.get("device", str), reader.integer("cores", minimum=1), reader.get("pinned", bool, False)
    )
    reader.done()
    return machine


def _parse_lengths(reader: Reader) -> BatchLengths:
    found = BatchLengths(
        reader.integer("iteration", minimum=0),
        _parse_counts(reader, "prompt"),
        _parse_counts(reader, "response"),
    )
    reader.done()
    return found


def _parse_counts(reader: Reader, key: str) -> Counts:
    rows = reader.get(key, list)
    for row in rows:
        is_pair = isinstance(row, list) and len(row) == 2
        if not is_pair or not all(type(n) is int and n >= 0 for n in row):
            raise InputError(
                f"{reader.at(key)}: expected pairs of whole numbers [tokens, count], found {row!r}."
            )
    return tuple((tokens, count) for tokens, count in rows)
