"""Predicted against measured: an iteration node by node and term by term, and why they differ.

Reads a plan and the trace of its run; knows no hardware. What a term's error is likely to come from
is decided by rules on numbers of the two, never guessed beyond them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from realloc.augmented import NodeKind
from realloc.errors import InputError
from realloc.pace import PaceFound, communication_s, pace_of
from realloc.plan import ExecutionPlan
from realloc.trace import Trace, TraceRecord, median, own_seconds

COMPUTE, WAITING = "compute", "waiting"
TIMED = ("tp_communication", "dp_communication", "pipeline", "optimizer")
"""Terms of calls that a run times apart. What is in none of them is compute."""
_TIMED_AS = {"bubble": "pipeline", "pp_communication": "pipeline", "mesh_communication": "optimizer"}

OFF = 0.2
"""A term is off when the measured seconds differ from the predicted ones by more than this share."""
LEAST_SHARE = 0.01
"""Differences below this share of an iteration are not worth a word."""
_NOTHING = 0.01
_LENGTHS_OFF = 0.05
_UNEVEN = 0.2
_UNSTEADY = 0.3
_PACE_OFF = 0.05
_CROWDED = 0.9
"""A rank that computes has its core for at least this share of the time, unless others want it too."""


@dataclass(frozen=True)
class Line:
    """One node (`term` empty), one of its terms, or the whole iteration (`node` empty)."""

    node: str
    term: str
    where: str
    predicted_s: float | None
    measured_s: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where next to nothing was predicted."""
        if self.predicted_s is None or self.measured_s is None:
            return None
        if self.predicted_s < max(1e-6, _NOTHING * self.measured_s):
            return None
        return self.measured_s / self.predicted_s

    @property
    def name(self) -> str:
        return ": ".join(part for part in (self.node or "iteration", self.term) if part)


@dataclass(frozen=True)
class Finding:
    """A term that is off, and what it likely comes from (empty where no rule says)."""

    line: Line
    causes: tuple[str, ...]


@dataclass(frozen=True)
class MemoryFound:
    """Peak bytes of the GPU that needs most, predicted and measured, and where that was: rank and node."""

    predicted_bytes: int
    measured_bytes: int
    rank: int
    node: str


@dataclass(frozen=True)
class Comparison:
    """`lines` in the plan's order, each node followed by its terms; `total` is the iteration.

    `pace`: how much slower the machine was than when it was profiled, where both are known. `memory`: on
    GPUs, whose allocators tell.
    """

    lines: tuple[Line, ...]
    total: Line
    findings: tuple[Finding, ...]
    costs: str
    pace: PaceFound | None = None
    memory: MemoryFound | None = None

    def at_pace(self, line: Line) -> float | None:
        """The line's ratio had the machine been as fast as when it was profiled: the model's own error."""
        return None if line.ratio is None or self.pace is None else line.ratio / self.pace.ratio


def timed_as(term: str) -> str:
    """The term as which a run times a predicted (or recorded) one."""
    name = _TIMED_AS.get(term, term)
    return name if name in TIMED else COMPUTE


def timed_terms(terms: Mapping[str, float]) -> dict[str, float]:
    """Predicted (or recorded) terms of a call, summed as a run can tell them apart."""
    result: dict[str, float] = {}
    for name, seconds in terms.items():
        key = timed_as(name)
        result[key] = result.get(key, 0.0) + seconds
    return result


def measured_terms(trace: Trace) -> Mapping[str, Mapping[str, float]]:
    """Call -> term -> median seconds, of the rank that the others wait for.

    That is the rank that spends least in communication: what another one spends beyond it is its
    waiting for this one. Only calls that were timed by term.
    """
    groups: dict[tuple[str, int], list[TraceRecord]] = {}
    timed = {record.node for record in trace.records if record.terms}
    for record in trace.steady():
        if record.node in timed:
            groups.setdefault((record.node, record.iteration), []).append(record)
    samples: dict[str, list[dict[str, float]]] = {}
    for (node, _), records in groups.items():
        busiest = min(records, key=communication_s)
        terms = timed_terms(busiest.terms)
        terms[COMPUTE] = max(0.0, busiest.end_s - busiest.start_s - sum(terms.values()))
        slowest = max(own_seconds(record) for record in records)
        terms[WAITING] = max(0.0, slowest - sum(terms.values()))
        samples.setdefault(node, []).append(terms)
    names, share = (COMPUTE, *TIMED, WAITING), trace.share_of_iterations()
    return {
        node: {name: median([terms.get(name, 0.0) for terms in found]) * share[node] for name in names}
        for node, found in samples.items()
    }


def check_match(plan: ExecutionPlan, trace: Trace) -> None:
    """Raises InputError when the trace cannot be one of the plan, or says nothing."""
    if not trace.records:
        raise InputError("the trace has no records: the run ended before its first iteration did.")
    if trace.world_size != plan.cluster.num_gpus:
        raise InputError(
            f"the run is of another plan: it had {trace.world_size} ranks, the plan has "
            f"{plan.cluster.num_gpus}."
        )
    ranks: dict[str, set[int]] = {}
    for record in trace.records:
        if record.kind in set(NodeKind):
            ranks.setdefault(record.node, set()).add(record.rank)
    nodes = plan.augmented.by_name
    ran = {record.iteration for record in trace.records}
    # a run that went on from a checkpoint may have been at no iteration that evaluates
    left_out = {name for name, node in nodes.items() if not any(map(node.runs_in, ran))}
    for name in sorted((nodes.keys() ^ ranks.keys()) - left_out):
        here, there = ("plan", "run") if name in nodes else ("run", "plan")
        raise InputError(f"the run is of another plan: '{name}' is in the {here} and not in the {there}.")
    for name, found in ranks.items():
        if found != set(nodes[name].ranks):
            raise InputError(
                f"the run is of another plan: '{name}' ran on ranks {_span(sorted(found))}, the plan has it "
                f"on {_span(nodes[name].ranks)}."
            )


def compare(plan: ExecutionPlan, trace: Trace) -> Comparison:
    """Compares a plan's predictions with a run of it. Raises InputError when they do not belong together."""
    check_match(plan, trace)
    predictions = plan.predictions
    node_s = {} if predictions is None else predictions.node_s
    predicted_terms = {} if predictions is None else predictions.terms
    measured, measured_by_term = trace.node_seconds(), measured_terms(trace)
    lines: list[Line] = []
    for name in plan.node_order:
        node = plan.augmented.by_name[name]
        where = str(plan.placements[name]) if name in plan.placements else f"ranks {_span(node.ranks)}"
        lines.append(Line(name, "", where, node_s.get(name), measured.get(name)))
        if name in measured_by_term:
            expected = timed_terms(predicted_terms[name]) if name in predicted_terms else None
            lines += _term_lines(name, expected, measured_by_term[name])
    total_s = None if predictions is None else predictions.iteration_s
    total = Line("", "", "", total_s, trace.iteration_seconds())
    waiting = _waiting_line(plan, trace, total)
    if waiting is not None:
        lines.append(waiting)
    pace = None
    if predictions is not None and predictions.pace is not None:
        pace = pace_of(trace, predictions.pace, plan.cluster.gpus_per_node)
    found = tuple(
        Finding(line, (*_pace_causes(line, pace), *_causes(plan, trace, line)))
        for line in (*lines, total)
        if _is_off(line, total)
    )
    costs = "" if predictions is None else predictions.costs
    return Comparison(tuple(lines), total, found, costs, pace, _memory(plan, trace))


def _memory(plan: ExecutionPlan, trace: Trace) -> MemoryFound | None:
    predicted = 0 if plan.predictions is None else sum(plan.predictions.peak_bytes.values())
    fullest = max(trace.records, key=lambda record: record.peak_bytes)
    if not predicted or not fullest.peak_bytes:
        return None
    return MemoryFound(predicted, fullest.peak_bytes, fullest.rank, fullest.node)


def _term_lines(
    node: str, expected: Mapping[str, float] | None, measured: Mapping[str, float]
) -> Iterable[Line]:
    """The terms that one of both sides has, where there is more to say than of the node as a whole."""
    present = [
        term
        for term in (COMPUTE, *TIMED, WAITING)
        if (expected or {}).get(term, 0.0) > 1e-6 or measured.get(term, 0.0) > 1e-6
    ]
    if len(present) < 2:
        return
    for term in present:
        yield Line(node, term, "", None if expected is None else expected.get(term, 0.0), measured[term])


def _waiting_line(plan: ExecutionPlan, trace: Trace, total: Line) -> Line | None:
    """What an iteration has beyond the nodes of its busiest rank."""
    if plan.predictions is None or total.predicted_s is None or total.measured_s is None:
        return None
    predicted, measured = plan.predictions.node_s, trace.node_seconds()

    def busy(seconds: Mapping[str, float]) -> float:
        return max(
            sum(seconds.get(node.name, 0.0) for node in plan.augmented.nodes if rank in node.ranks)
            for rank in range(trace.world_size)
        )

    spare = max(0.0, total.predicted_s - busy(predicted)), max(0.0, total.measured_s - busy(measured))
    return Line("", WAITING, "between nodes", *spare)


def _is_off(line: Line, total: Line) -> bool:
    if line.predicted_s is None or line.measured_s is None or not total.measured_s:
        return False
    difference = abs(line.measured_s - line.predicted_s)
    return difference > OFF * line.predicted_s and difference > LEAST_SHARE * total.measured_s


def _pace_causes(line: Line, pace: PaceFound | None) -> Iterable[str]:
    """Where the machine was slower, or faster, in the direction in which the line is off."""
    if pace is None or line.ratio is None or abs(pace.ratio - 1) < _PACE_OFF:
        return
    if (line.ratio > 1) == (pace.ratio > 1):
        yield pace_text(pace)


def pace_text(pace: PaceFound) -> str:
    factor, word = (pace.ratio, "slower") if pace.ratio >= 1 else (1 / pace.ratio, "faster")
    return f"the machine ran {factor:.2f} times {word} than when it was profiled"


def _causes(plan: ExecutionPlan, trace: Trace, line: Line) -> Iterable[str]:
    """What the numbers say, most certain first."""
    assert line.predicted_s is not None
    assert line.measured_s is not None
    slower = line.measured_s > line.predicted_s
    machine = trace.machine
    if slower and machine is not None and machine.cores < trace.world_size and is_host(machine.device):
        yield f"ranks share cores: {trace.world_size} ranks on {machine.cores} cores"
    if slower and line.term in ("", COMPUTE) and (busy := crowded(trace, line.node)):
        yield busy
    yield from _length_causes(plan, trace)
    if slower and line.node:
        yield from _uneven(trace, line)
    if plan.predictions is not None and plan.predictions.costs.startswith("analytic"):
        yield f"costs are {plan.predictions.costs}, not measured: plan with a profile of this machine"
    if slower:
        yield from _unsteady(trace, line)


def core_share(trace: Trace, node: str = "") -> float | None:
    """The share of their computing time for which ranks had a core, in calls.

    Communication is left out: who waits needs no core. None where the trace does not tell.
    """
    records = [r for r in trace.steady() if r.cpu_s and r.kind == "call" and node in ("", r.node)]
    spent = sum(r.end_s - r.start_s - communication_s(r) for r in records)
    return sum(r.cpu_s for r in records) / spent if spent > 0 else None


def crowded(trace: Trace, node: str = "") -> str:
    """That something else used the host on which ranks computed, in words; empty where nothing did."""
    share = core_share(trace, node)
    if trace.machine is None or not is_host(trace.machine.device) or share is None or share >= _CROWDED:
        return ""
    return f"something else used the machine: ranks had a core for {share:.0%} of their computing time"


def is_host(device: str) -> bool:
    """Whether the ranks compute on the host's cores: profiles name such a device a host."""
    return " host " in f" {device} "


def mean_lengths(trace: Trace) -> tuple[float, float] | None:
    """Mean prompt and mean response of the steady iterations; None where the trace does not tell."""
    first = min((item.iteration for item in trace.lengths), default=0)
    items = [item for item in trace.lengths if item.iteration > first] or list(trace.lengths)
    count = sum(n for item in items for _, n in item.prompt)
    if not count:
        return None
    prompts = sum(tokens * n for item in items for tokens, n in item.prompt)
    responses = sum(tokens * n for item in items for tokens, n in item.response)
    return prompts / count, responses / count


def _length_causes(plan: ExecutionPlan, trace: Trace) -> Iterable[str]:
    """Where either length makes a whole sequence longer or shorter than planned, by more than a little."""
    means = mean_lengths(trace)
    if means is None:
        return
    workload = plan.experiment.workload
    whole = workload.prompt.mean + workload.response.mean
    for name, found, planned in (
        ("prompts", means[0], workload.prompt.mean),
        ("responses", means[1], workload.response.mean),
    ):
        if abs(found - planned) > _LENGTHS_OFF * whole:
            yield (
                f"lengths differ from the workload: {name} of {found:.3g} tokens on average against "
                f"{planned:.3g} planned"
            )


def _uneven(trace: Trace, line: Line) -> Iterable[str]:
    """Ranks of one node that have unequal work: the plan prices equal shares."""
    own: dict[int, list[float]] = {}
    for record in trace.steady():
        if record.node == line.node and record.terms:
            spent = record.end_s - record.start_s - communication_s(record)
            own.setdefault(record.rank, []).append(spent)
    work = {rank: median(values) for rank, values in own.items()}
    if len(work) < 2:
        return
    least, most = min(work.values()), max(work.values())
    if most - least > _UNEVEN * most:
        yield f"ranks have unequal work: {least:.3g} to {most:.3g} s without communication"


def _unsteady(trace: Trace, line: Line) -> Iterable[str]:
    """The same node took different times: something else used the machine, or batches differ."""
    longest: dict[int, float] = {}
    for record in trace.steady():
        if record.node == line.node or not line.node:
            longest[record.iteration] = max(longest.get(record.iteration, 0.0), own_seconds(record))
    values = sorted(longest.values())
    if len(values) < 3:
        yield (
            f"only {len(values)} steady iterations were measured"
            if len(values) != 1
            else ("only one steady iteration was measured")
        )
        return
    low, high = values[len(values) // 4], values[(3 * len(values)) // 4]
    if high - low > _UNSTEADY * median(values):
        yield f"iterations differ among themselves: half of them took {low:.3g} to {high:.3g} s"


def _span(ranks: Sequence[int]) -> str:
    whole = len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))
