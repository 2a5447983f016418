"""An explanation as text for people (100 columns) and as JSON for programs. Computes nothing new."""

from __future__ import annotations

import json
from typing import Any

from planner.assess import KINDS, Assessment
from planner.budget import budget, kinds_of
from planner.explain import CallExplanation, Explanation, Gain
from planner.infeasible import describe_bytes
from planner.options import gib
from planner.report import table
from planner.result import Alternative
from planner.words import paragraph, seconds, share
from realloc.augmented import NodeKind
from realloc.strategy import strategy_content

NOTHING = 1e-4
"""Shares of an iteration below this are not worth a number."""
TERM = 0.03
"""Terms below this share of a call are not worth a word."""


def explanation_text(found: Explanation) -> str:
    sections = [
        _headline(found),
        _split(found),
        *(_call(found, call) for call in found.calls),
        _memory(found),
        _pace(found.assessment),
        _everywhere(found),
        found.note and paragraph(found.note),
    ]
    return "\n\n".join(section for section in sections if section)


def _headline(found: Explanation) -> str:
    a = found.assessment
    text = (
        f"{a.plan.experiment.algorithm} on {a.plan.cluster}: {seconds(a.iteration_s)} per iteration, "
        f"{a.tokens_per_s:,.0f} tokens/s."
    )
    if not a.fits:
        text += (
            f" It does not fit: GPU {a.memory.gpu} needs {gib(a.memory.total_bytes)} while {a.memory.call} "
            f"runs, but only {gib(a.capacity_bytes)} may be used."
        )
    return f"{paragraph(text)}\n{paragraph(costs_text(a))}"


def costs_text(a: Assessment) -> str:
    """Whether the costs were measured, and what follows."""
    provenance = a.costs.profile.provenance
    if provenance.source == "measured":
        text = (
            f"Costs were measured on {provenance.device}, {provenance.date}, each {provenance.samples} times."
        )
    else:
        text = (
            f"Costs are analytic ({a.costs.profile.name}): datasheet figures and published efficiencies, "
            f"nothing measured. `realloc profile` on the machine itself makes them measured."
        )
    predicted = a.plan.predictions
    if predicted is not None and predicted.iteration_s > 0:
        off = a.iteration_s / predicted.iteration_s - 1
        if abs(off) > 0.005:
            text += (
                f" The file says {seconds(predicted.iteration_s)} per iteration ({predicted.costs}): today's "
                f"costs say {off:+.1%}."
            )
    return text


def _split(found: Explanation) -> str:
    a = found.assessment
    rows = []
    for call in sorted(found.calls, key=lambda c: a.simulation.start_s[c.name]):
        time = call.time
        rows.append(
            (
                call.name,
                str(call.placement.mesh),
                f"{time.seconds:.4g}",
                *(f"{time.kinds[kind]:.3g}" if time.kinds[kind] else "-" for kind in KINDS),
                f"{time.waiting_s:.3g}" if time.waiting_s > NOTHING * a.iteration_s else "-",
                "critical" if call.critical else f"{time.slack_s:.3g}",
            )
        )
    header = ("call", "mesh", "seconds", "compute", "comm.", "bubble", "other", "waits", "slack")
    totals = kinds_of(budget(a))
    words = {
        "compute": "computing",
        "communication": "communicating within calls",
        "bubble": "pipeline bubbles",
    }
    words |= {"overhead": "fixed overheads", "moves": "moving data and parameters", "idle": "idle"}
    parts = [
        f"{words[kind]} {share(spent, a.iteration_s)}"
        for kind, spent in sorted(totals.items(), key=lambda item: -item[1])
        if spent > 0.0005 * a.iteration_s
    ]
    return "\n".join(
        [
            table(header, rows, right=tuple(range(2, 9))),
            paragraph(
                "waits: how long its GPUs are idle before it. slack: how much longer it could take at no "
                "cost; a critical call sets the pace."
            ),
            "",
            paragraph(f"All GPUs' time: {', '.join(parts)}."),
        ]
    )


def call_sentences(found: Explanation, call: CallExplanation) -> tuple[str, ...]:
    """What a call got and why, a sentence each."""
    a = found.assessment
    mesh = call.placement.mesh
    lines = [
        f"{call.name}: {mesh.size} of {a.plan.cluster.num_gpus} GPUs ({call.placement}). {_spends(call)}"
    ]
    if call.critical:
        lines.append("It sets the pace: every second it loses, an iteration loses.")
    elif call.time.slack_s > 0:
        lines.append(
            f"It is not critical: it could take {seconds(call.time.slack_s)} longer at no cost"
            + (f", beside {_names(a, call)}." if _names(a, call) else ".")
        )
    if call.constraints:
        lines.append(f"Constrained by the experiment: {', '.join(call.constraints)}.")
    if call.next_best is not None:
        lines.append(_next_best(a, call.next_best))
    elif not found.note:
        lines.append("No other placement was found in the time given (--time-limit).")
    if call.with_memory is not None:
        lines.append(_forced(a, call.with_memory))
    if call.overlooked is not None:
        gain = call.overlooked
        saved = a.iteration_s - gain.iteration_s
        lines.append(
            f"Better, and it fits: {gain.placement} would save {seconds(saved)} an iteration "
            f"({share(saved, a.iteration_s)}), all else as it is."
        )
    return tuple(lines)


def _names(a: Assessment, call: CallExplanation) -> str:
    """The calls on other GPUs that run while this one does."""
    start, end = a.simulation.start_s, a.simulation.end_s
    period = a.iteration_s
    beside = []
    for other in a.plan.placements:
        if other == call.name or other in call.shares_gpus_with:
            continue
        meets = any(
            start[call.name] < end[other] + k * period and start[other] + k * period < end[call.name]
            for k in (-2, -1, 0, 1, 2)
        )
        if meets:
            beside.append(other)
    return " and ".join(beside)


def _spends(call: CallExplanation) -> str:
    time = call.time
    terms = [
        f"{term.replace('_', ' ')} {share(spent, time.seconds)}"
        for term, spent in sorted(time.terms.items(), key=lambda item: -item[1])
        if spent >= TERM * time.seconds
    ]
    return f"{seconds(time.seconds)}: {', '.join(terms)}; {gib(call.own_bytes)} a GPU."


def _next_best(a: Assessment, other: Alternative) -> str:
    where = other.name.removeprefix(f"{other.call} on ").removeprefix(f"{other.call} ")
    if other.iteration_s is None:
        return f"No other placement fits: {other.why}."
    slower = other.iteration_s - a.iteration_s
    if slower <= NOTHING * a.iteration_s:
        return f"Next best: {where}, as good by this cost model."
    lost = f"{seconds(slower)} an iteration slower ({share(slower, a.iteration_s)})"
    return f"Next best: {where}, {lost}: {other.why}."


def _forced(a: Assessment, gain: Gain) -> str:
    saved = a.iteration_s - gain.iteration_s
    return (
        f"Memory forced this: {gain.placement} would save {seconds(saved)} an iteration "
        f"({share(saved, a.iteration_s)}), but makes {gib(gain.peak_bytes)} a GPU with the other calls, and "
        f"{gib(a.capacity_bytes)} may be used."
    )


def _call(found: Explanation, call: CallExplanation) -> str:
    first, *rest = call_sentences(found, call)
    return "\n".join([paragraph(first, "  ", ""), *(paragraph(line, "  ") for line in rest)])


def memory_sentences(found: Explanation) -> tuple[str, ...]:
    a = found.assessment
    memory = a.memory
    lines = [
        f"Memory: {gib(memory.total_bytes)} of {gib(a.capacity_bytes)} "
        f"({share(memory.total_bytes, a.capacity_bytes)}) at most, on GPU {memory.gpu} while {memory.call} "
        f"runs: {describe_bytes(memory.by_cause)}."
    ]
    copies = sum(
        s for name, s in a.node_s.items()
        if a.plan.augmented.by_name[name].kind in (NodeKind.LOAD, NodeKind.OFFLOAD)
    )  # fmt: skip
    if copies:
        lines.append(f"Offloading to the host costs {seconds(copies)} of copies an iteration.")
    if found.without_memory_s is not None:
        saved = a.iteration_s - found.without_memory_s
        faster = f"{seconds(found.without_memory_s)} ({share(saved, a.iteration_s)} less)"
        if saved <= 1e-3 * a.iteration_s:
            lines.append("Memory forces nothing: with memory without end no faster plan was found.")
        elif found.without_memory_bytes > a.capacity_bytes:
            lines.append(
                f"That is what memory costs: without end of it the best plan found takes {faster}, and needs "
                f"{gib(found.without_memory_bytes)} a GPU."
            )
        else:
            lines.append(f"A plan of {faster} was found that fits: run `realloc search` again, or longer.")
    return tuple(lines)


def _memory(found: Explanation) -> str:
    return "\n".join(paragraph(line) for line in memory_sentences(found))


def pace_sentences(a: Assessment) -> tuple[str, ...]:
    """The critical path, and which GPUs are idle."""
    simulation, calls = a.simulation, a.plan.placements
    on_way = [n for n in simulation.critical if n in calls or not n.startswith(f"{NodeKind.TRANSFER}:")]
    spans = ""
    if simulation.critical_iterations > 1:
        spans = f" (over {simulation.critical_iterations} iterations)"
    way = f"Critical path{spans}: {' -> '.join(f'{n} {seconds(a.node_s[n])}' for n in on_way)}."
    idle = []
    for shared in a.shared:
        busy = sum(a.node_s[name] for name in shared.nodes if a.occupies(name))
        name = f"GPU{'s' if len(shared.ranks) > 1 else ''} {shared.name}"
        idle.append(f"{name} {share(max(0.0, a.iteration_s - busy), a.iteration_s)}")
    unused = f"; {a.unused_gpus} GPUs have nothing to do" if a.unused_gpus else ""
    return way, f"Idle: {', '.join(idle)}{unused}; {share(a.idle_share, 1.0)} of all GPUs' time."


def _pace(a: Assessment) -> str:
    return "\n".join(paragraph(line, "  ", "") for line in pace_sentences(a))


def _everywhere(found: Explanation) -> str:
    a = found.assessment
    lines = []
    for item in found.everywhere:
        if item.iteration_s is None:
            lines.append(paragraph(f"With {item.name}: does not fit: {item.why}.", "  ", ""))
        else:
            slower = f"{item.iteration_s / a.iteration_s:.2f} times as long: {item.why}"
            lines.append(paragraph(f"With {item.name}: {seconds(item.iteration_s)}, {slower}.", "  ", ""))
    return "\n".join(lines)


def explanation_json(found: Explanation) -> str:
    """Everything of the text. Seconds and bytes are in the keys' names."""
    a = found.assessment
    content = {
        "algorithm": a.plan.experiment.algorithm,
        "cluster": str(a.plan.cluster),
        "costs": a.costs.provenance,
        "iteration_s": a.iteration_s,
        "tokens_per_s": a.tokens_per_s,
        "fits": a.fits,
        "split_s": dict(kinds_of(budget(a))),
        "critical": list(a.simulation.critical),
        "idle": [
            {
                "gpus": shared.name,
                "busy_s": sum(a.node_s[name] for name in shared.nodes if a.occupies(name)),
            }
            for shared in a.shared
        ],
        "memory": {
            "gpu": a.memory.gpu,
            "call": a.memory.call,
            "peak_bytes": a.memory.total_bytes,
            "capacity_bytes": a.capacity_bytes,
            "by_cause_bytes": dict(a.memory.by_cause),
            "without_limit_s": found.without_memory_s,
            "without_limit_bytes": found.without_memory_bytes,
        },
        "calls": {call.name: _call_json(call) for call in found.calls},
        "note": found.note,
    }
    return json.dumps(content, indent=2)


def _call_json(call: CallExplanation) -> dict[str, Any]:
    other = call.next_best
    return {
        "mesh": str(call.placement.mesh),
        "strategy": strategy_content(call.placement.strategy),
        "seconds": call.time.seconds,
        "terms_s": dict(call.time.terms),
        "split_s": {**call.time.kinds, "waiting": call.time.waiting_s},
        "slack_s": call.time.slack_s,
        "critical": call.critical,
        "own_bytes": call.own_bytes,
        "constraints": list(call.constraints),
        "next_best": None
        if other is None
        else {"name": other.name, "iteration_s": other.iteration_s, "why": other.why},
        "with_memory": _gain_json(call.with_memory),
        "overlooked": _gain_json(call.overlooked),
    }


def _gain_json(gain: Gain | None) -> dict[str, Any] | None:
    if gain is None:
        return None
    return {
        "mesh": str(gain.placement.mesh),
        "strategy": strategy_content(gain.placement.strategy),
        "iteration_s": gain.iteration_s,
        "peak_bytes": gain.peak_bytes,
    }
