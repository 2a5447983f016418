"""The page: sections, tables, style. One file, nothing from outside, readable without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from planner.assess import Assessment
from planner.explain import Explanation
from planner.explain_text import NOTHING, call_sentences, costs_text, memory_sentences, pace_sentences
from planner.options import gib
from planner.page import colours as palette
from planner.page.cluster_map import cluster_map
from planner.page.memory_chart import causes_of, charted, memory_chart, steps
from planner.page.split_chart import SPLIT_COLOURS, bars, split_chart, split_kinds, whole_chart, whole_kinds
from planner.page.style import SCRIPT, STYLE
from planner.page.timeline import MOST_ROWS, timeline
from planner.words import seconds, share
from realloc.comparison import check_match
from realloc.trace import Trace


def plan_page(found: Explanation, title: str, trace: Trace | None = None) -> str:
    """The page of an explained plan; `trace`: of a run of it.

    Raises InputError when the trace is of another plan.
    """
    a = found.assessment
    if trace is not None:
        check_match(a.plan, trace)
    start = a.simulation.start_s
    calls = palette.of(sorted(a.plan.placements, key=lambda name: start[name]))
    sections = [
        ("map", "Which call runs where", _legend(calls, "call") + cluster_map(a, calls)),
        ("timeline", "When: three iterations of the steady state", _timeline(a, calls)),
        ("split", "What the time is spent on", _split(a, trace)),
        ("memory", "Memory over an iteration", _memory(found)),
        ("placements", "Placements", _placements(found, trace)),
        ("why", "Why", _why(found)),
    ]
    links = "".join(f'<a href="#{name}">{escape(text.split(":")[0])}</a>' for name, text, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(text)}</h2>{content}</section>' for name, text, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(a.plan.experiment.algorithm)} on "
        f"{escape(str(a.plan.cluster))}</p>{_numbers(found, trace)}<nav>{links}</nav></header>"
        f"<main>{body}</main><footer>{escape(costs_text(a))}</footer><script>{SCRIPT}</script></body></html>\n"
    )


def _numbers(found: Explanation, trace: Trace | None) -> str:
    a = found.assessment
    figures = [
        (seconds(a.iteration_s), "per iteration, predicted"),
        (f"{a.tokens_per_s:,.0f}", "tokens per second"),
        (share(1 - a.idle_share, 1.0), f"of {a.plan.cluster.num_gpus} GPUs' time is used"),
        (gib(a.memory.total_bytes), f"at most on a GPU, of {gib(a.capacity_bytes)}"),
    ]
    if trace is not None:
        figures.insert(1, (seconds(trace.iteration_seconds()), "per iteration, measured"))
    predicted = a.plan.predictions
    if predicted is not None and predicted.lower_bound_s:
        figures.append((seconds(predicted.lower_bound_s), "bound: no candidate plan takes less"))
    items = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in figures
    )
    warning = ""
    if not a.fits:
        warning = '<p class="warning">This plan does not fit in memory.</p>'
    return f'<div class="numbers">{items}</div>{warning}'


def _legend(colours: Mapping[str, str], data: str = "") -> str:
    items = []
    for name, colour in colours.items():
        attribute = f' data-{data}="{escape(name)}"' if data else ""
        text = escape(name.replace("_", " ") if not data else name)
        items.append(f'<span{attribute}><i style="background:{colour}"></i>{text}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def _timeline(a: Assessment, colours: Mapping[str, str]) -> str:
    note = ""
    if len(a.shared) > MOST_ROWS:
        note = f"<p>The {MOST_ROWS} commonest of {len(a.shared)} kinds of GPUs are shown.</p>"
    more = {**colours, "moves": palette.NEUTRAL}
    return _legend(more, "call") + timeline(a, colours) + note + _paragraphs(pace_sentences(a))


def _split(a: Assessment, trace: Trace | None) -> str:
    found = bars(a, trace)
    parts = {part: SPLIT_COLOURS[part] for part in split_kinds(found)}
    kinds = {kind: SPLIT_COLOURS[kind] for kind in whole_kinds(a)}
    text = f"<h3>All GPUs' time</h3>{_legend(kinds)}{whole_chart(a)}"
    return f"{text}<h3>Call by call</h3>{_legend(parts)}{split_chart(found)}"


def _memory(found: Explanation) -> str:
    a = found.assessment
    shown = charted(a)
    causes = causes_of([steps(a, shared) for shared in shown])
    colours = palette.of(causes)
    charts = "".join(memory_chart(a, shared, colours) for shared in shown)
    text = _paragraphs(memory_sentences(found))
    return f'{_legend(colours)}<div class="charts">{charts}</div>{text}'


def _placements(found: Explanation, trace: Trace | None) -> str:
    a = found.assessment
    measured = {} if trace is None else trace.node_seconds()
    header = ["call", "mesh", "GPUs", "strategy", "predicted"]
    header += ["measured"] if trace is not None else []
    header += ["waits", "slack", "own memory", "next best"]
    rows = []
    for call in sorted(found.calls, key=lambda c: a.simulation.start_s[c.name]):
        other = call.next_best
        cost = "-"
        if other is not None:
            slower = None if other.iteration_s is None else other.iteration_s - a.iteration_s
            is_as_good = slower is not None and slower <= NOTHING * a.iteration_s
            cost = "does not fit" if slower is None else "as good" if is_as_good else f"{slower:+.3g} s"
        row = [
            call.name,
            str(call.placement.mesh),
            str(call.placement.mesh.size),
            str(call.placement.strategy),
        ]
        row.append(seconds(call.time.seconds))
        row += [seconds(measured[call.name]) if call.name in measured else "-"] if trace is not None else []
        row += [
            seconds(call.time.waiting_s) if call.time.waiting_s > NOTHING * a.iteration_s else "-",
            "critical" if call.critical else seconds(call.time.slack_s),
            gib(call.own_bytes),
            cost,
        ]
        rows.append(row)
    note = (
        "Waits: how long its GPUs are idle before it. Slack: how much longer it could take at no cost. Next "
        "best: what an iteration would lose with the best other placement of the call."
    )
    return f"{_table(header, rows)}<p>{note}</p>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _why(found: Explanation) -> str:
    parts = []
    for call in sorted(found.calls, key=lambda c: found.assessment.simulation.start_s[c.name]):
        first, *rest = call_sentences(found, call)
        lead = first.removeprefix(f"{call.name}: ")
        parts.append(f"<h3>{escape(call.name)}</h3>{_paragraphs((lead, *rest))}")
    a = found.assessment
    for item in found.everywhere:
        if item.iteration_s is None:
            text = f"With {item.name}: does not fit: {item.why}."
        else:
            text = f"With {item.name}: {item.iteration_s / a.iteration_s:.2f} times as long: {item.why}."
        parts.append(_paragraphs((text,)))
    parts.append(_paragraphs((found.note,)) if found.note else "")
    return f'<div class="columns">{"".join(f"<article>{part}</article>" for part in parts if part)}</div>'


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)
