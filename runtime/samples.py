"""A few generated samples of every iteration, as text, for whoever looks after a run.

Each rank reports what it holds of them; put together they are the lines of `samples.jsonl`. Decides which
sequences are shown; knows nothing of where they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realloc.dataflow import CallKind, DataflowGraph, Output
from realloc.plan import ExecutionPlan
from runtime.data_store import IterationData

Parts = dict[str, dict[str, Any]]
"""Position of a sequence, as text -> what a rank knows of it."""


@dataclass(frozen=True)
class SampleKeys:
    """The keys that say what was generated and how it was scored."""

    tokens: str
    scores: tuple[str, ...]


def sample_keys(graph: DataflowGraph) -> SampleKeys | None:
    """Those of the first call that generates; None where nothing does."""
    generate = next((call for call in graph.calls if call.kind is CallKind.GENERATE), None)
    if generate is None:
        return None
    tokens = generate.writes[0]
    scores = [
        key
        for call in graph.calls
        if tokens in call.reads and (call.kind is CallKind.COMPUTE or call.output is Output.SCORES)
        for key in call.writes
        if call.sequence == tokens or call.kind is CallKind.COMPUTE
    ]
    return SampleKeys(tokens, tuple(scores))


def shown_positions(iteration: int, num_sequences: int, count: int) -> Sequence[int]:
    """Which sequences of an iteration are shown: spread over the batch, others in every iteration."""
    count = min(count, num_sequences)
    return [(i * num_sequences // count + iteration) % num_sequences for i in range(count)]


class SampleReporter:
    """What one rank tells of the samples. It tells what its own calls have written."""

    def __init__(
        self, plan: ExecutionPlan, rank: int, count: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._count, self._decode = count, decode
        keys = sample_keys(plan.graph)
        mine = {
            key
            for call in plan.graph.calls
            if rank in plan.placements[call.name].mesh.ranks
            for key in call.writes
        }
        self._tokens = keys.tokens if keys is not None and keys.tokens in mine else None
        self._scores = [key for key in keys.scores if key in mine] if keys is not None else []

    def parts(self, iteration: int, data: IterationData) -> Parts:
        """What this rank holds of the iteration's samples."""
        found: Parts = {}
        for position in shown_positions(iteration, data.num_sequences, self._count):
            part: dict[str, Any] = {}
            tokens = data.values.get(self._tokens or "", {}).get(position)
            if tokens is not None:
                prompt = data.prompt_lengths[position]
                ids = tokens.tolist()
                part["prompt"], part["response"] = self._decode(ids[:prompt]), self._decode(ids[prompt:])
            for key in self._scores:
                value = data.values.get(key, {}).get(position)
                if value is not None:
                    part[key] = value.item() if bool(value.isfinite()) else None  # None: without a score
            if part:
                found[str(position)] = part | {"id": iteration * data.num_sequences + position}
        return found


def put_together(iteration: int, reports: Sequence[Parts]) -> list[Mapping[str, Any]]:
    """The lines of one iteration: `iteration`, `id`, `prompt`, `response` and what scores there are."""
    joined: Parts = {}
    for report in reports:
        for position, part in report.items():
            joined.setdefault(position, {}).update(part)
    order = ("id", "prompt", "response")
    lines: list[Mapping[str, Any]] = []
    for position in sorted(joined, key=int):
        part = joined[position]
        if "response" in part:
            scores = {key: part[key] for key in sorted(part) if key not in order}
            lines.append({"iteration": iteration, **{key: part[key] for key in order}, **scores})
    return lines
