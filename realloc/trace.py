"""Traces: what every instruction of every rank took, beside what was predicted.

A trace is JSON lines: a header `{"realloc": "trace/1", ...}`, then one record a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Trace:
    world_size: int
    records: tuple[TraceRecord, ...]

    def node_seconds(self, *, skip_iterations: int = 1) -> Mapping[str, float]:
        """Median over iterations of each node's longest time over ranks, waiting excluded.

        The first iterations warm up and are skipped when there are others. (A resumed run's first
        iteration is not 0.)
        """
        longest: dict[tuple[str, int], float] = {}
        first = min((r.iteration for r in self.records), default=0)
        last = max((r.iteration for r in self.records), default=0)
        for record in self.records:
            if record.iteration - first < skip_iterations <= last - first:
                continue
            key = (record.node, record.iteration)
            spent = record.end_s - record.start_s - record.wait_s
            longest[key] = max(longest.get(key, 0.0), spent)
        times: dict[str, list[float]] = {}
        for (node, _), seconds in longest.items():
            times.setdefault(node, []).append(seconds)
        return {node: median(values) for node, values in times.items()}

    def iteration_seconds(self, *, skip_iterations: int = 1) -> float:
        """Steady seconds per iteration: median distance between ends of successive iterations."""
        ends: dict[int, float] = {}
        for record in self.records:
            ends[record.iteration] = max(ends.get(record.iteration, 0.0), record.end_s)
        order = sorted(ends)
        gaps = [ends[b] - ends[a] for a, b in pairwise(order)]
        if not gaps:
            return ends[order[0]] if order else 0.0
        return median(gaps[max(0, skip_iterations - 1) :] or gaps)


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def trace_lines(world_size: int, records: Iterable[TraceRecord]) -> Iterable[str]:
    """The lines of a trace file, header first."""
    yield json.dumps({"realloc": f"trace/{VERSIONS['trace']}", "world_size": world_size})
    for record in records:
        yield json.dumps(asdict(record))


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
    header.done()
    records = [_parse(_json_line(path, i, line), world_size) for i, line in enumerate(lines[1:], 2) if line]
    return Trace(world_size, tuple(records))


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
    )
    reader.raw("predicted_s", None)
    reader.done()
    if record.end_s < record.start_s:
        raise InputError(f"{reader.where}: ends at {record.end_s} s, before its start at {record.start_s} s.")
    return record
