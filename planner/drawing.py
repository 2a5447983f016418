"""Dataflow graphs as text and as pictures: calls in columns, each right of all that it reads from.

Decides where things are drawn. Knows no plans: a graph looks the same on any cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.page import colours
from planner.page.svg import Drawing, text_width
from planner.words import paragraph
from realloc.dataflow import Call, CallKind, DataflowGraph

BOX_WIDTH, BOX_HEIGHT = 150.0, 44.0
COLUMN, ROW, MARGIN = 250.0, 78.0, 24.0
_STYLE = (
    ".edge{fill:none;stroke:#5b6470;stroke-width:1.3}.strong{fill:#1b1f24}"
    ".version{fill:none;stroke:#8a8f98;stroke-width:1.3;stroke-dasharray:5 4}"
)


def columns(graph: DataflowGraph) -> Sequence[Sequence[Call]]:
    """The calls by depth: how many calls the longest chain of data up to them has."""
    depth: dict[str, int] = {}
    edges = graph.data_edges()
    waiting = list(graph.calls)
    while waiting:
        for call in list(waiting):
            sources = [src for src, dst in edges if dst == call.name]
            if all(src in depth for src in sources):
                depth[call.name] = 1 + max((depth[src] for src in sources), default=-1)
                waiting.remove(call)
    return [
        [call for call in graph.calls if depth[call.name] == column]
        for column in range(max(depth.values(), default=-1) + 1)
    ]


def graph_text(graph: DataflowGraph) -> str:
    """One line a call in the order of their columns, with what it reads from whom; then the versions."""
    width = max(len(call.name) for call in graph.calls)
    lines = []
    for column in columns(graph):
        for call in column:
            reads = [f"{key} from {graph.producer.get(key, 'the data set')}" for key in call.reads]
            when = f", every {call.every} iterations" if call.every > 1 else ""
            text = f"{_what(call)}{when}; reads {', '.join(reads)}"
            if call.writes:
                text += f"; writes {', '.join(call.writes)}"
            lines.append(paragraph(text, " " * (width + 2), first=f"{call.name:{width}}  "))
    for trainer, users in _versions(graph).items():
        names = ", ".join(users)
        lines.append(f"{trainer} gives {names} the parameters of the next iteration.")
    return "\n".join(lines)


def _what(call: Call) -> str:
    if call.kind is CallKind.COMPUTE:
        sources = [source.title for source in call.functions] or [key for key, _ in call.weights]
        return f"compute {call.report or ' + '.join(sources)}"
    text = f"{call.kind.value} of {call.role}"
    if call.greedy:
        text += ", greedy"
    if call.mini_batches > 1:
        text += f", {call.mini_batches} mini-batches"
    if call.epochs > 1:
        text += f", {call.epochs} epochs"
    if call.select is not None:
        text += f", on {call.selected} selected sequences"
    if call.mixture is not None:
        text += f", with {call.mixture.sequence}"
    return text


def _versions(graph: DataflowGraph) -> Mapping[str, Sequence[str]]:
    """train_step -> the calls of its role that use what it trained in the next iteration."""
    found: dict[str, list[str]] = {}
    for role in graph.roles:
        trainer = graph.maker(role)
        for call in graph.calls_of(role) if trainer else ():
            if trainer is not None and call.name != trainer.name:
                found.setdefault(trainer.name, []).append(call.name)
    return found


def graph_svg(graph: DataflowGraph, title: str) -> str:
    """The text of one SVG file: solid lines are data, dashed ones parameters for the next iteration."""
    layers = columns(graph)
    tallest = max(len(layer) for layer in layers)
    height = 2 * MARGIN + 40 + tallest * ROW + 34
    width = 2 * MARGIN + (len(layers) - 1) * COLUMN + BOX_WIDTH
    drawing = Drawing(height, title, max(width, 2 * MARGIN + text_width(title, 14)))
    drawing.text(MARGIN, MARGIN + 4, title, css="strong", size=14)
    at: dict[str, tuple[float, float]] = {}
    for column, layer in enumerate(layers):
        top = MARGIN + 40 + (tallest - len(layer)) * ROW / 2
        for row, call in enumerate(layer):
            at[call.name] = (MARGIN + column * COLUMN, top + row * ROW)
    _draw_edges(drawing, graph, at, MARGIN + 24)
    _draw_versions(drawing, graph, at, height - MARGIN)
    fill = colours.of(call.role or "function" for call in graph.calls)
    for call in graph.calls:
        x, y = at[call.name]
        colour = fill[call.role or "function"]
        drawing.rect(x, y, BOX_WIDTH, BOX_HEIGHT, colour, title=_what(call))
        ink = colours.ink_on(colour)
        drawing.label(x, y - 7, BOX_WIDTH, BOX_HEIGHT, (call.name,), ink)
        short = call.kind.value if call.role is None else f"{call.kind.value} of {call.role}"
        drawing.label(x, y + 8, BOX_WIDTH, BOX_HEIGHT, (_what(call), short, call.kind.value), ink)
        if call.writes:
            drawing.text(x + 30, y + BOX_HEIGHT + 13, ", ".join(call.writes), size=10, css="faint")
    return drawing.file(_STYLE)


def _draw_edges(
    drawing: Drawing, graph: DataflowGraph, at: Mapping[str, tuple[float, float]], ceiling: float
) -> None:
    """From the right of the producer to the left of the consumer; over everything where calls lie between."""
    arriving: dict[str, int] = {}
    for src, dst in graph.data_edges():
        x1, y1 = at[src][0] + BOX_WIDTH, at[src][1] + BOX_HEIGHT / 2
        order = arriving[dst] = arriving.get(dst, -1) + 1
        x2, y2 = at[dst][0], at[dst][1] + 8 + 9.0 * (order % 4)
        bend = x2 - 14
        if x2 - at[src][0] <= COLUMN:
            path = [(x1, y1), (x1 + 14, y1), (bend, y2), (x2, y2)]
        else:
            path = [(x1, y1), (x1 + 14, y1), (x1 + 30, ceiling), (bend - 30, ceiling), (bend, y2), (x2, y2)]
        drawing.polyline(path, "edge")


def _draw_versions(
    drawing: Drawing, graph: DataflowGraph, at: Mapping[str, tuple[float, float]], floor: float
) -> None:
    """Under everything, back from each train_step to the calls that get its parameters."""
    for level, (trainer, users) in enumerate(_versions(graph).items()):
        y = floor - 8.0 * level
        x = at[trainer][0] + BOX_WIDTH - 16 - 10 * level
        for user in users:
            left = at[user][0] + 16 + 10 * level
            bottom = at[user][1] + BOX_HEIGHT
            drawing.polyline([(x, at[trainer][1] + BOX_HEIGHT), (x, y), (left, y), (left, bottom)], "version")
