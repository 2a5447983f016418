"""Which call runs on which GPU: a box for every kind of node, a bar for every call on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.assess import Assessment
from planner.page.colours import ink_on
from planner.page.svg import WIDTH, Drawing

BAR, GAP, HEAD = 22.0, 3.0, 40.0
_MARGIN = 16.0


@dataclass(frozen=True)
class NodeKind:
    """Nodes `first` to `last` that run the same parts of the same calls. `bars`: (call, GPUs of the node)."""

    first: int
    last: int
    bars: tuple[tuple[str, range], ...]

    @property
    def title(self) -> str:
        if self.first == self.last:
            return f"node {self.first}"
        return f"nodes {self.first}-{self.last} ({self.last - self.first + 1} alike)"


def node_kinds(assessment: Assessment) -> tuple[NodeKind, ...]:
    """Runs of consecutive nodes that are alike; calls in the order in which they start."""
    plan = assessment.plan
    per_node = plan.cluster.gpus_per_node
    calls = sorted(plan.placements, key=lambda name: assessment.simulation.start_s[name])
    found: list[NodeKind] = []
    for node in range(plan.cluster.num_nodes):
        bars = []
        for name in calls:
            mesh = plan.placements[name].mesh
            low = max(mesh.first - node * per_node, 0)
            high = min(mesh.first + mesh.size - node * per_node, per_node)
            if low < high:
                bars.append((name, range(low, high)))
        if found and found[-1].bars == tuple(bars):
            found[-1] = NodeKind(found[-1].first, node, tuple(bars))
        else:
            found.append(NodeKind(node, node, tuple(bars)))
    return tuple(found)


def cluster_map(assessment: Assessment, colours: Mapping[str, str]) -> str:
    kinds = node_kinds(assessment)
    columns = 1 if len(kinds) == 1 else 2 if len(kinds) <= 4 else 3
    width = (WIDTH - _MARGIN * (columns - 1)) / columns
    rows = [kinds[i : i + columns] for i in range(0, len(kinds), columns)]
    heights = [max(_height(kind) for kind in row) for row in rows]
    drawing = Drawing(sum(heights) + _MARGIN * (len(rows) - 1), "which call runs on which GPU")
    y = 0.0
    for row, height in zip(rows, heights, strict=True):
        for column, kind in enumerate(row):
            _node(drawing, assessment, kind, column * (width + _MARGIN), y, width, height, colours)
        y += height + _MARGIN
    return drawing.markup()


def _height(kind: NodeKind) -> float:
    return HEAD + max(1, len(kind.bars)) * (BAR + GAP) + 8


def _node(
    drawing: Drawing,
    assessment: Assessment,
    kind: NodeKind,
    x: float,
    y: float,
    width: float,
    height: float,
    colours: Mapping[str, str],
) -> None:
    per_node = assessment.plan.cluster.gpus_per_node
    drawing.rect(x + 0.5, y + 0.5, width - 1, height - 1, css="box")
    drawing.text(x + 10, y + 17, kind.title, css="strong")
    cell = (width - 16) / per_node
    for gpu in range(per_node):
        left = x + 8 + gpu * cell
        words: Sequence[str] = (f"GPU {gpu}", str(gpu)) if cell > 22 or gpu % 4 == 0 else ()
        drawing.label(left, y + 20, cell, 18, words)
        if gpu:
            drawing.line(left, y + HEAD - 3, left, y + height - 6, "grid")
    if not kind.bars:
        drawing.text(x + width / 2, y + HEAD + 15, "nothing runs here", anchor="middle", css="faint")
    for i, (name, gpus) in enumerate(kind.bars):
        top = y + HEAD + i * (BAR + GAP)
        left, wide = x + 8 + gpus.start * cell, len(gpus) * cell
        placement = assessment.plan.placements[name]
        drawing.rect(left + 1, top, wide - 2, BAR, colours[name], title=f"{name}: {placement}", call=name)
        words = _words(name, str(placement.strategy), len(gpus), placement.mesh.size)
        drawing.label(left, top, wide, BAR, words, ink_on(colours[name]))


def _words(name: str, strategy: str, here: int, size: int) -> Sequence[str]:
    whole = f" (of {size} GPUs)" if size > here else ""
    return f"{name}  {strategy}{whole}", f"{name}  {strategy}", name
