"""What was chosen and why, as text for people (100 columns) and as JSON for programs.

Formats a search result; computes nothing that the result does not say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from planner.infeasible import describe_bytes
from planner.options import gib
from planner.predict import beyond_measured
from planner.result import Alternative, SearchResult
from planner.words import span
from realloc.augmented import NodeKind, Placement, copied_causes
from realloc.strategy import strategy_content

WIDTH = 100


def report_text(result: SearchResult) -> str:
    """The report as plain text."""
    sections = [
        _headline(result),
        _calls(result),
        _sources(result),
        _moves(result),
        _memory(result),
        _pace(result),
        _runners_up(result),
        _rejections(result),
        _search(result),
    ]
    return "\n\n".join(section for section in sections if section)


def _headline(result: SearchResult) -> str:
    plan, predictions = result.plan, result.plan.predictions
    assert predictions is not None
    if result.proven:
        bound = "No candidate plan is faster: proven, but for orders of nodes that search does not try."
    else:
        bound = (
            f"No candidate plan takes less than {result.lower_bound_s:.4g} s, but for orders of nodes that "
            f"search does not try: at most {result.gap:.1%} of the time could be saved."
        )
    if 0 < result.bound_of_all_s < result.lower_bound_s:
        share = 1 - result.bound_of_all_s / result.iteration_s
        bound += (
            f" With the strategies that are priced but left out on so large a cluster: "
            f"{result.bound_of_all_s:.4g} s ({share:.1%})."
        )
    bound = "\n".join(wrap(bound, WIDTH))
    return (
        f"Plan for {plan.experiment.algorithm} on {plan.cluster}\n"
        f"{result.iteration_s:.4g} s per iteration, {predictions.tokens_per_s:,.0f} tokens/s "
        f"(costs: {predictions.costs}).\n{bound}"
    )


def _sources(result: SearchResult) -> str:
    """Which seconds do not rest on measurements of the model at hand."""
    predictions = result.plan.predictions
    assert predictions is not None
    if predictions.costs.startswith("analytic"):
        return ""
    text = beyond_measured(predictions.sources)
    return f"Beyond what was measured (realloc profile --experiment):\n{text}" if text else ""


def _calls(result: SearchResult) -> str:
    rows = []
    order = {name: i for i, name in enumerate(result.plan.order or ())}
    for name, placement in sorted(result.plan.placements.items(), key=lambda item: order[item[0]]):
        start = result.simulation.start_s[name]
        end = result.simulation.end_s[name]
        rows.append(
            (
                name,
                str(placement.mesh),
                str(placement.strategy),
                f"{end - start:.4g}",
                f"{start:.4g} - {end:.4g}",
                gib(sum(result.call_bytes[name].values())),
            )
        )
    header = ("call", "mesh", "strategy", "seconds", "from - to", "own memory")
    return table(header, rows, right=(3, 5))


def _moves(result: SearchResult) -> str:
    predictions = result.plan.predictions
    assert predictions is not None
    seconds = predictions.node_s
    calls = result.plan.placements
    # what is dropped takes no time
    dropped = {
        n.name for n in result.plan.augmented.nodes if n.kind is NodeKind.OFFLOAD and not seconds[n.name]
    }
    moves = {name: s for name, s in seconds.items() if name not in calls and name not in dropped}
    if not moves:
        return "Nothing moves between calls: they share their meshes and layouts."
    small = 0.001 * result.iteration_s
    shown = [name for name, s in moves.items() if not name.startswith(f"{NodeKind.TRANSFER}:") or s >= small]
    rows = [(*_ends(name, result), f"{moves[name]:.4g}") for name in shown]
    rest = [s for name, s in moves.items() if name not in shown]
    text = table(("moves", "from", "to", "seconds"), rows, right=(3,)) if rows else ""
    if rest:
        more = f"{len(rest)} transfers of data, {sum(rest):.3g} s together."
        text = f"{text}\nand {more}" if text else more
    return text


def _ends(name: str, result: SearchResult) -> tuple[str, str, str]:
    """What moves from where to where: an augmented node's name, made readable."""
    kind, first, last, *_ = name.split(":")
    if kind in (NodeKind.LOAD, NodeKind.OFFLOAD):
        causes = copied_causes(result.plan.graph, result.plan.augmented.by_name[name])
        ends = ("host memory", last) if kind == NodeKind.LOAD else (last, "host memory")
        return f"{' and '.join(causes)} of {first}", *ends
    if kind == NodeKind.REALLOCATE:
        return f"parameters of {first}", "its train_step", last
    return "data", first, last


def _memory(result: SearchResult) -> str:
    memory = result.memory
    share = memory.total_bytes / result.capacity_bytes
    line = (
        f"Peak memory: {gib(memory.total_bytes)} of {gib(result.capacity_bytes)} ({share:.0%}), on GPU "
        f"{memory.gpu} while {memory.call} runs: {describe_bytes(memory.by_cause)}."
    )
    return "\n".join(wrap(line, WIDTH))


def _pace(result: SearchResult) -> str:
    simulation, calls = result.simulation, result.plan.placements
    on_way = [
        name for name in simulation.critical if name in calls or not name.startswith(f"{NodeKind.TRANSFER}:")
    ]
    spans = ""
    if simulation.critical_iterations > 1:
        spans = f" over {simulation.critical_iterations} iterations"
    pace = wrap(f"What sets the pace{spans}: {' -> '.join(on_way)}.", WIDTH, subsequent_indent="  ")
    rows = []
    idle = []
    for item in simulation.busy:
        rows.append(f"{span(item.ranks)}: {item.busy_s / max(simulation.iteration_s, 1e-12):.0%}")
        idle.append(len(item.ranks))
    unused = result.plan.cluster.num_gpus - sum(idle)
    if unused:
        rows.append(f"{unused} unused")
    busy = wrap(f"GPUs busy: {', '.join(rows)}.", WIDTH, subsequent_indent="  ")
    return "\n".join(pace + busy)


def _runners_up(result: SearchResult) -> str:
    if not result.runners_up:
        return ""
    lines = ["Why others lost:"]
    width = max(len(item.name) for item in result.runners_up)
    for item in result.runners_up:
        if item.iteration_s is None:
            lead = f"  {item.name:{width}}  {'does not fit':>18}  "
        else:
            slower = item.iteration_s - result.iteration_s
            lead = f"  {item.name:{width}}  {item.iteration_s:8.4g} s {slower:+7.3g}  "
        lines += wrap(lead + item.why, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines)


def _rejections(result: SearchResult) -> str:
    if not result.rejections:
        return ""
    totals: dict[str, int] = {}
    examples: dict[str, str] = {}
    for item in result.rejections:
        totals[item.reason] = totals.get(item.reason, 0) + item.count
        examples.setdefault(item.reason, f"{item.call} {item.example}")
    lines = ["Placements left out:"]
    for reason, count in sorted(totals.items(), key=lambda entry: -entry[1]):
        line = f"  {count:7,d}  {reason} (such as {examples[reason]})"
        lines += wrap(line, WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False)
    return "\n".join(lines)


def _search(result: SearchResult) -> str:
    last = result.history[-1] if result.history else None
    found = f"; the plan was found after {last.elapsed_s:.2f} s" if last else ""
    if result.interrupted:
        found += "; interrupted: this is the best plan so far"
    return (
        f"Search: method {result.method}, {result.evaluated:,} of {result.num_plans:.3g} plans looked at "
        f"in {result.elapsed_s:.2f} s{found}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; those in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            f"{cell:>{width}}" if i in right else f"{cell:{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def report_json(result: SearchResult) -> str:
    """The report as a JSON object. Seconds and bytes are in the keys' names."""
    predictions = result.plan.predictions
    assert predictions is not None
    content: dict[str, Any] = {
        "algorithm": result.plan.experiment.algorithm,
        "cluster": str(result.plan.cluster),
        "costs": predictions.costs,
        "iteration_s": result.iteration_s,
        "tokens_per_s": predictions.tokens_per_s,
        "lower_bound_s": result.lower_bound_s,
        "bound_of_all_s": result.bound_of_all_s,
        "gap": result.gap,
        "proven": result.proven,
        "placements": _placements_json(result.plan.placements),
        "order": list(result.plan.order or ()),
        "node_s": dict(predictions.node_s),
        "start_s": dict(result.simulation.start_s),
        "critical": list(result.simulation.critical),
        "busy": [{"gpus": span(item.ranks), "busy_s": item.busy_s} for item in result.simulation.busy],
        "memory": {
            "gpu": result.memory.gpu,
            "call": result.memory.call,
            "peak_bytes": result.memory.total_bytes,
            "capacity_bytes": result.capacity_bytes,
            "by_cause_bytes": dict(result.memory.by_cause),
            "by_call_bytes": {name: dict(causes) for name, causes in result.call_bytes.items()},
        },
        "runners_up": [_alternative_json(item) for item in result.runners_up],
        "rejections": [vars(item) for item in result.rejections],
        "search": {
            "method": result.method,
            "plans": result.num_plans,
            "evaluated": result.evaluated,
            "elapsed_s": result.elapsed_s,
            "interrupted": result.interrupted,
            "history": [vars(item) for item in result.history],
        },
    }
    return json.dumps(content, indent=2)


def _placements_json(placements: Mapping[str, Placement]) -> dict[str, Any]:
    return {
        name: {"mesh": str(p.mesh), "strategy": strategy_content(p.strategy)}
        for name, p in placements.items()
    }


def _alternative_json(item: Alternative) -> dict[str, Any]:
    return {
        "name": item.name,
        "call": item.call,
        "iteration_s": item.iteration_s,
        "peak_bytes": item.peak_bytes,
        "why": item.why,
        "placements": _placements_json(item.placements),
    }
