"""Timelines as JSON that Perfetto (ui.perfetto.dev) and chrome://tracing show.

The format is Chrome's "Trace Event Format": complete events (`ph: X`) with microseconds, a process
for each timeline, a thread for each rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from realloc.trace import Trace


@dataclass(frozen=True)
class Span:
    """Something that a rank does from `start_s` on; `about` is shown with it."""

    rank: int
    name: str
    kind: str
    start_s: float
    seconds: float
    about: Mapping[str, Any] = field(default_factory=dict)


def measured_spans(trace: Trace) -> Iterable[Span]:
    """What a run did; the time before an instruction's last rank arrived is a span of its own."""
    for r in trace.records:
        about: dict[str, Any] = {"iteration": r.iteration, **{f"{k}_s": v for k, v in r.terms.items()}}
        if r.tokens:
            about["tokens"] = r.tokens
        if r.sent_bytes:
            about["sent_bytes"] = r.sent_bytes
        if r.predicted_s is not None:
            about["predicted_s"] = r.predicted_s
        if r.wait_s > 0:
            yield Span(r.rank, f"wait: {r.node}", "wait", r.start_s, r.wait_s)
        yield Span(r.rank, r.node, r.kind, r.start_s + r.wait_s, r.end_s - r.start_s - r.wait_s, about)


def chrome_trace(timelines: Mapping[str, Sequence[Span]]) -> str:
    """The timelines as a JSON document, each a process with that name."""
    events: list[dict[str, Any]] = []
    for process, (name, spans) in enumerate(timelines.items(), 1):
        events.append(_named("process_name", name, pid=process))
        for rank in sorted({span.rank for span in spans}):
            events.append(_named("thread_name", f"rank {rank}", pid=process, tid=rank))
        events += [
            {
                "ph": "X",
                "pid": process,
                "tid": span.rank,
                "name": span.name,
                "cat": span.kind,
                "ts": round(span.start_s * 1e6, 3),
                "dur": round(span.seconds * 1e6, 3),
                "args": dict(span.about),
            }
            for span in spans
        ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _named(what: str, name: str, **where: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "args": {"name": name}, **where}
