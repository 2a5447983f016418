"""What every GPU does when, over some iterations of the steady state; GPUs that do the same share a row."""

from __future__ import annotations

from collections.abc import Mapping

from planner.assess import Assessment, SharedRanks
from planner.page.colours import NEUTRAL, ink_on
from planner.page.svg import WIDTH, Drawing, text_width, ticks
from planner.words import seconds
from realloc.augmented import NodeKind

ITERATIONS = 3
ROW, GAP, TOP, BOTTOM = 30.0, 6.0, 20.0, 40.0
MOST_ROWS = 24


def timeline(assessment: Assessment, colours: Mapping[str, str]) -> str:
    a = assessment
    rows = rows_of(a)
    left = max(70.0, *(text_width(_row_name(row)) + 16 for row in rows))
    height = TOP + len(rows) * (ROW + GAP) + BOTTOM
    drawing = Drawing(height, "timeline of all GPUs over three iterations")
    span_s = ITERATIONS * a.iteration_s
    scale = (WIDTH - left - 12) / max(span_s, 1e-12)
    foot = TOP + len(rows) * (ROW + GAP)
    for value in ticks(span_s, 10):
        x = left + value * scale
        drawing.line(x, TOP - 4, x, foot, "grid")
        drawing.text(x, foot + 15, f"{value:.4g}", anchor="middle")
    drawing.text(left + span_s * scale / 2, foot + 33, "seconds", anchor="middle", css="faint")
    for i, row in enumerate(rows):
        _row(drawing, a, row, left, TOP + i * (ROW + GAP), scale, colours)
    for k in range(ITERATIONS + 1):
        x = left + k * a.iteration_s * scale
        drawing.line(x, TOP - 6, x, foot, "period")
        if k < ITERATIONS:
            name = f"iteration {k + 1}: {seconds(a.iteration_s)}"
            drawing.text(x + 4, TOP - 8, name, css="faint", size=11)
    return drawing.markup()


def rows_of(assessment: Assessment) -> tuple[SharedRanks, ...]:
    """The busiest kinds of GPUs where there are too many to draw, in the order of their ranks."""
    shared = assessment.shared
    if len(shared) <= MOST_ROWS:
        return shared
    kept = sorted(shared, key=lambda row: -len(row.ranks))[:MOST_ROWS]
    return tuple(sorted(kept, key=lambda row: row.ranks))


def _row_name(row: SharedRanks) -> str:
    name = row.name
    if len(name) > 18:
        first = name.split(" and ")[0]
        name = f"{first} and {len(row.ranks) - _count(first)} more"
    return f"GPU {name}" if len(row.ranks) == 1 else f"GPUs {name}"


def _count(ranks: str) -> int:
    first, _, last = ranks.partition("-")
    return int(last or first) - int(first) + 1


def _row(
    drawing: Drawing,
    a: Assessment,
    row: SharedRanks,
    left: float,
    y: float,
    scale: float,
    colours: Mapping[str, str],
) -> None:
    span_s = ITERATIONS * a.iteration_s
    drawing.text(left - 8, y + ROW / 2 + 4, _row_name(row), anchor="end")
    drawing.rect(left, y, span_s * scale, ROW, css="idle", title=f"GPUs {row.name}: idle")
    for name in row.nodes:
        node = a.plan.augmented.by_name[name]
        is_call = node.kind is NodeKind.CALL
        colour = colours[name] if is_call else NEUTRAL
        beside = not a.occupies(name)  # on the copy engine, while the GPU does something else
        top, high = (y + ROW - 5, 5.0) if beside else (y, ROW)
        for iteration in range(-2, ITERATIONS + 1):
            start = a.simulation.start_s[name] + iteration * a.iteration_s
            end = start + a.node_s[name]
            low, up = max(start, 0.0), min(end, span_s)
            if up <= low:
                continue
            x, wide = left + low * scale, (up - low) * scale
            title = f"{name}, iteration {iteration + 1}: {seconds(a.node_s[name])} from {start:.4g} s"
            drawing.rect(x, top, max(wide, 0.7), high, colour, title=title, call=name if is_call else "moves")
            if not beside:
                words = (f"{name} {seconds(a.node_s[name])}", name) if is_call else (str(node.kind),)
                drawing.label(x, y, wide, ROW, words, ink_on(colour))
