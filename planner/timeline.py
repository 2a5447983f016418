"""A plan's simulated iteration for people: a chart of who does what when, every node's seconds by
term, what sets the pace, and memory; and the same as spans for a trace viewer.

Formats an assessment; computes nothing new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

from planner.assess import Assessment
from planner.infeasible import describe_bytes
from planner.options import gib
from planner.report import WIDTH, table
from planner.words import span
from realloc.augmented import NodeKind
from realloc.chrome_trace import Span

_SMALL = 1e-3
"""What takes less of an iteration is not worth a line."""
_MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def timeline_text(assessment: Assessment) -> str:
    """Chart, table of nodes, critical path and memory."""
    sections = (_headline, _chart, _nodes, _call_terms, _pace, _memory)
    return "\n\n".join(section(assessment) for section in sections)


def _headline(assessment: Assessment) -> str:
    plan = assessment.plan
    return (
        f"{plan.experiment.algorithm} on {plan.cluster}: {assessment.iteration_s:.4g} s per iteration in "
        f"the steady state, {assessment.tokens_per_s:,.0f} tokens/s (costs: {assessment.costs.provenance})."
    )


def _marks(assessment: Assessment) -> Mapping[str, str]:
    """A letter for every node that has one, in the order in which they run; `*` beyond the alphabet."""
    order = [node for node in assessment.order if assessment.node_s[node] > 0]
    return {name: _MARKS[i] if i < len(_MARKS) else "*" for i, name in enumerate(order)}


def _chart(assessment: Assessment) -> str:
    """One row for GPUs that do the same; a letter for each node, dots where they wait."""
    simulation, marks = assessment.simulation, _marks(assessment)
    names = [shared.name for shared in assessment.shared]
    room = WIDTH - max(map(len, names), default=0) - len("GPU  ||")
    whole = max(simulation.end_s.values())
    lines = []
    for shared, name in zip(assessment.shared, names, strict=True):
        cells = ["."] * room
        for node in shared.nodes:
            start, end = simulation.start_s[node], simulation.end_s[node]
            if node in marks and assessment.occupies(node):
                first = min(room - 1, int(start / whole * room))
                for cell in range(first, max(first + 1, min(room, round(end / whole * room)))):
                    cells[cell] = marks[node]
        lines.append(f"GPU {name:<{max(map(len, names))}} |{''.join(cells)}|")
    return "\n".join([*lines, f"one iteration, 0 to {whole:.4g} s"])


def _nodes(assessment: Assessment) -> str:
    """Every node but the smallest transfers, with its start and seconds."""
    marks, simulation = _marks(assessment), assessment.simulation
    by_name = assessment.plan.augmented.by_name
    least = _SMALL * assessment.iteration_s
    rows, rest = [], []
    for name in sorted(assessment.order, key=lambda node: simulation.start_s[node]):
        seconds = assessment.node_s[name]
        if by_name[name].kind is NodeKind.TRANSFER and seconds < least:
            rest.append(seconds)
            continue
        start, mark = f"{simulation.start_s[name]:.4g}", marks.get(name, "")
        rows.append((mark, name, span(by_name[name].ranks), start, f"{seconds:.4g}"))
    text = table(("", "node", "GPUs", "start", "seconds"), rows, right=(3, 4))
    return f"{text}\nand {len(rest)} small transfers of data, {sum(rest):.3g} s together." if rest else text


def _call_terms(assessment: Assessment) -> str:
    """Seconds of the calls by term; terms that no call has are left out."""
    calls = [name for name in assessment.order if name in assessment.plan.placements]
    terms = {name: _terms(assessment, name) for name in calls}
    present = dict.fromkeys(term for found in terms.values() for term in found)
    rows = [
        (name, *(f"{terms[name][term]:.3g}" if term in terms[name] else "" for term in present))
        for name in calls
    ]
    header = ("seconds of", *(term.replace("_communication", " comm.") for term in present))
    return table(header, rows, right=tuple(range(1, len(header))))


def _terms(assessment: Assessment, name: str) -> Mapping[str, float]:
    """A call's terms that are worth a word: a thousandth of it and more. Others have none."""
    if name not in assessment.plan.placements:
        return {}
    terms = assessment.call_time(name).terms
    return {term: s for term, s in terms.items() if s >= 1e-3 * assessment.node_s[name]}


def _pace(assessment: Assessment) -> str:
    simulation = assessment.simulation
    over = f" over {simulation.critical_iterations} iterations" if simulation.critical_iterations > 1 else ""
    least = _SMALL * assessment.iteration_s
    way = [name for name in simulation.critical if assessment.node_s[name] >= least]
    text = f"Critical path{over}: {' -> '.join(way)}."
    return "\n".join(wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def _memory(assessment: Assessment) -> str:
    profile = assessment.costs.profile
    beside = profile.reserved_bytes if assessment.plan.cluster.memory_bytes is None else 0
    left = f", beside {gib(beside)} for the driver, NCCL and the allocator's fragments" if beside else ""
    lines = [f"Peak memory of {gib(assessment.capacity_bytes)} a GPU{left}:"]
    for shared in assessment.shared:
        peak = assessment.fullest(shared.ranks)
        text = f"GPU {shared.name}: {gib(peak.total_bytes)} while {peak.call} runs: "
        text += describe_bytes(peak.by_cause)
        if peak.total_bytes > assessment.capacity_bytes:
            text += "; this does not fit"
        lines += wrap(text, WIDTH, subsequent_indent="    ", initial_indent="  ")
    return "\n".join(lines)


def timeline_content(assessment: Assessment) -> Mapping[str, Any]:
    """The timeline as a JSON object; seconds and bytes are in the keys' names."""
    simulation = assessment.simulation
    return {
        "iteration_s": assessment.iteration_s,
        "tokens_per_s": assessment.tokens_per_s,
        "costs": assessment.costs.provenance,
        "nodes": [
            {
                "name": name,
                "gpus": span(assessment.plan.augmented.by_name[name].ranks),
                "start_s": simulation.start_s[name],
                "seconds": assessment.node_s[name],
                "terms": dict(_terms(assessment, name)),
            }
            for name in assessment.order
        ],
        "critical": list(simulation.critical),
        "critical_iterations": simulation.critical_iterations,
        "memory": {
            shared.name: {
                "peak_bytes": peak.total_bytes,
                "call": peak.call,
                "by_cause_bytes": dict(peak.by_cause),
            }
            for shared in assessment.shared
            for peak in [assessment.fullest(shared.ranks)]
        },
        "capacity_bytes": assessment.capacity_bytes,
    }


def predicted_spans(assessment: Assessment) -> Iterable[Span]:
    """One steady iteration, for a trace viewer."""
    simulation = assessment.simulation
    for node in assessment.plan.augmented.nodes:
        about = {f"{term}_s": seconds for term, seconds in _terms(assessment, node.name).items()}
        for rank in node.ranks:
            yield Span(
                rank,
                node.name,
                str(node.kind),
                simulation.start_s[node.name],
                assessment.node_s[node.name],
                about,
            )
