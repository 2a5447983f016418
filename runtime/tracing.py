"""Recording what each instruction took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from realloc.pace import PACE
from realloc.trace import BatchLengths, Machine, Trace, TraceRecord, counted, read_trace, trace_lines

CHECKPOINT = "checkpoint"
"""The record of the time in which a rank copies its state for a checkpoint."""


class Recorder:
    """Records of one rank. Times are seconds since `epoch_s` (a `time.time()` all ranks share).

    On a GPU the allocator's peaks between records are told too.
    """

    def __init__(self, rank: int, epoch_s: float, device: torch.device | None = None) -> None:
        self._rank = rank
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._offset = epoch_s - (time.time() - time.perf_counter())
        self.records: list[TraceRecord] = []
        self.lengths: list[BatchLengths] = []

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
        terms: Mapping[str, float] | None = None,
        cpu_s: float = 0.0,
    ) -> None:
        self.records.append(
            TraceRecord(
                iteration=iteration,
                rank=self._rank,
                node=node,
                kind=kind,
                start_s=start_s,
                end_s=self.now(),
                predicted_s=predicted_s,
                sent_bytes=sent_bytes,
                tokens=tokens,
                terms=terms or {},
                cpu_s=cpu_s,
                peak_bytes=self._peak_bytes(),
            )
        )

    def _peak_bytes(self) -> int:
        """Since the record before."""
        if self._gpu is None:
            return 0
        peak: int = torch.cuda.max_memory_allocated(self._gpu)
        torch.cuda.reset_peak_memory_stats(self._gpu)
        return peak

    def add_lengths(self, iteration: int, prompts: Sequence[int], totals: Sequence[int]) -> None:
        """How long the iteration's prompts were, and its sequences as a whole."""
        responses = (total - prompt for prompt, total in zip(prompts, totals, strict=True))
        self.lengths.append(BatchLengths(iteration, counted(prompts), counted(responses)))


def with_waits(records: Iterable[TraceRecord]) -> list[TraceRecord]:
    """The records with `wait_s`: how long each rank waited for the last rank to arrive.

    Ranks do not wait for each other to take a checkpoint, nor where their pace is taken.
    """
    ordered = sorted(records, key=lambda r: (r.iteration, r.start_s, r.rank))
    arrival: dict[tuple[int, str], float] = {}
    for record in ordered:
        if record.kind in (CHECKPOINT, PACE):
            continue
        key = (record.iteration, record.node)
        arrival[key] = max(arrival.get(key, record.start_s), record.start_s)
    return [
        replace(r, wait_s=max(0.0, min(arrival.get((r.iteration, r.node), r.start_s), r.end_s) - r.start_s))
        for r in ordered
    ]


def write_trace(path: Path, trace: Trace) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for line in trace_lines(trace.world_size, trace.records, trace.lengths, trace.machine):
            stream.write(line + "\n")


def merge_traces(paths: Iterable[Path], output: Path, machine: Machine) -> Trace:
    """Joins the ranks' traces into one file, waits filled in."""
    traces = [read_trace(path) for path in paths]
    merged = Trace(
        world_size=max((trace.world_size for trace in traces), default=1),
        records=tuple(with_waits(record for trace in traces for record in trace.records)),
        lengths=tuple(item for trace in traces for item in trace.lengths),
        machine=machine,
    )
    # under its name only when it is whole: that it is there says that the run is complete
    partial = output.with_name(f".{output.name}.partial")
    write_trace(partial, merged)
    partial.replace(output)
    return merged
