"""Recording what each instruction took, and where each rank is right now."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from realloc.trace import Trace, TraceRecord, read_trace, trace_lines

CHECKPOINT = "checkpoint"
"""The record of the time in which a rank copies its state for a checkpoint."""
_STATUS = struct.Struct("<qqd")


class Recorder:
    """Records of one rank. Times are seconds since `epoch_s` (a `time.time()` all ranks share)."""

    def __init__(self, rank: int, epoch_s: float) -> None:
        self._rank = rank
        self._offset = epoch_s - (time.time() - time.perf_counter())
        self.records: list[TraceRecord] = []

    def now(self) -> float:
        return time.perf_counter() - self._offset

    def add(
        self,
        iteration: int,
        node: str,
        kind: str,
        start_s: float,
        *,
        predicted_s: float | None,
        sent_bytes: int = 0,
        tokens: int = 0,
    ) -> None:
        self.records.append(
            TraceRecord(
                iteration, self._rank, node, kind, start_s, self.now(), 0.0, predicted_s, sent_bytes, tokens
            )
        )


class Status:
    """A small file that always says which instruction a rank is in, for when it dies."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def set(self, iteration: int, index: int) -> None:
        os.pwrite(self._file, _STATUS.pack(iteration, index, time.time()), 0)

    def close(self) -> None:
        os.close(self._file)


def read_status(path: Path) -> tuple[int, int] | None:
    """(iteration, instruction index) that a rank was in last; None when it had not begun."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _STATUS.size:
        return None
    iteration, index, _ = _STATUS.unpack(content[: _STATUS.size])
    return iteration, index


def with_waits(records: Iterable[TraceRecord]) -> list[TraceRecord]:
    """The records with `wait_s`: how long each rank waited for the last rank to arrive.

    Ranks do not wait for each other to take a checkpoint.
    """
    ordered = sorted(records, key=lambda r: (r.iteration, r.start_s, r.rank))
    arrival: dict[tuple[int, str], float] = {}
    for record in ordered:
        if record.kind == CHECKPOINT:
            continue
        key = (record.iteration, record.node)
        arrival[key] = max(arrival.get(key, record.start_s), record.start_s)
    return [
        replace(r, wait_s=max(0.0, min(arrival.get((r.iteration, r.node), r.start_s), r.end_s) - r.start_s))
        for r in ordered
    ]


def write_trace(path: Path, world_size: int, records: Sequence[TraceRecord]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for line in trace_lines(world_size, records):
            stream.write(line + "\n")


def merge_traces(paths: Iterable[Path], output: Path) -> Trace:
    """Joins the ranks' traces into one file, waits filled in."""
    traces = [read_trace(path) for path in paths]
    records = with_waits(record for trace in traces for record in trace.records)
    world_size = max((trace.world_size for trace in traces), default=1)
    write_trace(output, world_size, records)
    return Trace(world_size, tuple(records))
