"""Pace: how fast a machine runs a fixed piece of work, when it was profiled and while it runs a plan.

Cores that share a host, its memory and its clock with others change their pace by half within
seconds. Ranks therefore run the same short piece of work at the ends of iterations (`runtime.pace`);
how long it had a core, against when the profile was made, and for which share of their computing ranks
had a core at all, tell a slow machine from a wrong model. Decides how the two are compared; knows no
hardware and runs nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from realloc.files import Reader
from realloc.trace import Trace, TraceRecord, median

PACE = "pace"
"""The kind, and the node, of the records of such work."""
COST_SHARE = 0.004
"""Of an iteration, at most, for which ranks are at it. Nothing prices it."""
EVERY = 8
"""Iterations from one to the next where nobody has predicted how long they take."""
ALIKE = 1.12
"""Times the usual seconds, up to which a moment is at that pace: they vary by some percent, or by half."""
_CUT = 0.1


@dataclass(frozen=True)
class Pace:
    """What the work took on the profiled machine: by itself, and with all `ranks` of a host computing.

    `spread`: the distance of the quartiles over the profile's points, as a share of their median.
    """

    alone_s: float
    together_s: float
    ranks: int
    spread: float = 0.0

    def expected_s(self, busy: int) -> float:
        """Seconds with so many ranks of the host computing, the one at the work among them."""
        if self.ranks < 2:
            return self.alone_s
        share = min(busy, self.ranks) - 1
        return self.alone_s + (self.together_s - self.alone_s) * share / (self.ranks - 1)


@dataclass(frozen=True)
class PaceFound:
    """How many times longer an iteration took than at the pace of the profiled machine.

    `work`: how many times longer the work had a core, with the quartiles `low` and `high` of the `samples`;
    `core_share`: for how much of their computing time ranks had one.
    """

    ratio: float
    work: float
    low: float
    high: float
    core_share: float
    samples: int


def iterations_between(iteration_s: float | None, work_s: float) -> int:
    """Every how many iterations the work of so many seconds is done, the same on all ranks."""
    if not iteration_s:
        return EVERY
    return max(1, ceil(work_s / (COST_SHARE * iteration_s)))


def pace_of(trace: Trace, profiled: Pace, per_node: int) -> PaceFound | None:
    """The pace of a run's steady iterations; None where the trace does not tell.

    Compared is with what the work took beside as many computing ranks of the host (`per_node` of them
    on each) as there were at its middle. What counts of the samples is their mean, as an iteration adds
    up what it meets.
    """
    found = _ratios(trace, trace.steady(), profiled, per_node)
    if not found:
        return None
    ratios = sorted(ratio for _, ratio in found)
    quarter = len(ratios) // 4
    work = usual(ratios)
    shares, seconds = core_shares(trace), trace.each_iteration_s()
    at_pace_s = median([s * shares.get(iteration, 1.0) / work for iteration, s in seconds.items()])
    share = median([shares.get(iteration, 1.0) for iteration in seconds])
    ratio = trace.iteration_seconds() / at_pace_s
    return PaceFound(ratio, work, ratios[quarter], ratios[-1 - quarter], share, len(ratios))


def _ratios(
    trace: Trace, records: Iterable[TraceRecord], profiled: Pace, per_node: int
) -> Sequence[tuple[TraceRecord, float]]:
    """Records of the pace, of ranks with calls in the iteration, and how many times longer they took."""
    at_work = {(record.iteration, record.rank) for record in trace.records if record.kind == "call"}
    computing = _by_rank(trace)
    found = []
    for record in records:
        if record.kind != PACE or (record.iteration, record.rank) not in at_work:
            continue
        host = record.rank // per_node
        middle = (record.start_s + record.end_s) / 2
        others = range(host * per_node, min((host + 1) * per_node, trace.world_size))
        busy = 1 + sum(_is_busy(computing.get(r, ()), middle) for r in others if r != record.rank)
        found.append((record, record.cpu_s / profiled.expected_s(busy)))
    return found


def iterations_at_pace(trace: Trace, profiled: Pace, per_node: int) -> Collection[int]:
    """Iterations at whose beginning and end every rank had the pace of the profile, within `ALIKE`."""
    alike: dict[int, set[bool]] = {}
    for record, ratio in _ratios(trace, trace.records, profiled, per_node):
        alike.setdefault(record.iteration, set()).add(max(ratio, 1 / ratio) <= ALIKE)
    return {i for i in alike if alike[i] == {True} and alike.get(i - 1) == {True}}


def usual(samples: Sequence[float]) -> float:
    """Their mean without a tenth of them at either end, as an iteration adds up what it meets."""
    cut = int(_CUT * len(samples))
    kept = sorted(samples)[cut : len(samples) - cut]
    return sum(kept) / len(kept)


def core_shares(trace: Trace) -> Mapping[int, float]:
    """Iteration -> the share of their computing time for which ranks had a core, in calls.

    Communication is left out: who waits needs no core. Empty where the trace does not tell.
    """
    sums: dict[int, list[float]] = {}
    for record in trace.records:
        if record.cpu_s and record.kind == "call":
            found = sums.setdefault(record.iteration, [0.0, 0.0])
            found[0] += record.cpu_s
            found[1] += record.end_s - record.start_s - communication_s(record)
    return {iteration: min(1.0, cpu / spent) for iteration, (cpu, spent) in sums.items() if spent > 0}


def communication_s(record: TraceRecord) -> float:
    """Seconds of a call in which it waited for other ranks or their messages."""
    return sum(seconds for name, seconds in record.terms.items() if name != "optimizer")


Spans = Sequence[tuple[float, float]]


def _by_rank(trace: Trace) -> Mapping[int, Spans]:
    """When each rank computed: its calls and this work, in the order of time, without what it waited."""
    spans: dict[int, list[tuple[float, float]]] = {}
    for record in trace.records:
        if _computes(record):
            spans.setdefault(record.rank, []).append((record.start_s + record.wait_s, record.end_s))
    return {rank: sorted(found) for rank, found in spans.items()}


def _computes(record: TraceRecord) -> bool:
    return record.kind in (PACE, "call")


def _is_busy(spans: Spans, moment: float) -> bool:
    """Whether one of the spans, which do not overlap, is around the moment."""
    place = bisect_right(spans, (moment, float("inf")))
    return place > 0 and spans[place - 1][1] >= moment


def read_pace(reader: Reader | None) -> Pace | None:
    """The pace that a profile or a plan tells of, where it does. Raises InputError naming the key."""
    if reader is None:
        return None
    pace = Pace(
        alone_s=reader.number("alone_s", minimum=1e-9, maximum=60.0),
        together_s=reader.number("together_s", minimum=1e-9, maximum=60.0),
        ranks=reader.integer("ranks", minimum=1),
        spread=reader.number("spread", 0.0, minimum=0.0),
    )
    reader.done()
    return pace


def pace_content(pace: Pace) -> Mapping[str, object]:
    """The pace as the mapping that a file holds."""
    return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in vars(pace).items()}
