"""What lies in a GPU's memory over one iteration, by cause, and how much there is room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.assess import Assessment, SharedRanks
from planner.memory import held_at
from planner.options import gib
from planner.page.svg import Drawing, ticks
from realloc.cluster import GIB

CHART_WIDTH, CHART_HEIGHT = 590.0, 230.0
LEFT, TOP, RIGHT, BOTTOM = 52.0, 26.0, 8.0, 52.0
MOST_CHARTS = 6


@dataclass(frozen=True)
class Step:
    """From `start_s` to `end_s` of an iteration a GPU holds `by_cause`, because of `node`."""

    start_s: float
    end_s: float
    node: str
    by_cause: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.by_cause.values())


def steps(assessment: Assessment, shared: SharedRanks) -> tuple[Step, ...]:
    """One iteration of the fullest of the GPUs, from its first start on. Idle time holds what is there after
    the node before, without what that worked with."""
    a = assessment
    graph, placements = a.plan.graph, a.plan.placements
    gpu = a.fullest(shared.ranks).gpu
    memory = a.memory_on(gpu)

    def held(node: str) -> Mapping[str, int]:
        return held_at(graph, placements, memory, gpu, a.order, node)

    nodes = [name for name in shared.nodes if a.occupies(name)]
    found: list[Step] = []
    origin = a.simulation.start_s[nodes[0]]
    for i, name in enumerate(nodes):
        start, end = a.simulation.start_s[name], a.simulation.end_s[name]
        after = a.simulation.start_s[nodes[i + 1]] if i + 1 < len(nodes) else origin + a.iteration_s
        causes = held(name)
        found.append(Step(start - origin, end - origin, name, causes))
        if after > end + 1e-9 * a.iteration_s:
            working = memory[name].working if name in memory else {}
            rest = {cause: size - working.get(cause, 0) for cause, size in causes.items()}
            found.append(Step(end - origin, after - origin, "", rest))
    return tuple(found)


def causes_of(every: Sequence[Sequence[Step]]) -> tuple[str, ...]:
    """All causes that hold anything, those that stay longest first."""
    totals: dict[str, float] = {}
    for found in every:
        for step in found:
            for cause, size in step.by_cause.items():
                totals[cause] = totals.get(cause, 0.0) + size * (step.end_s - step.start_s)
    fixed = ("parameters", "optimizer", "gradients")
    return tuple(sorted((c for c, t in totals.items() if t > 0), key=lambda c: (c not in fixed, -totals[c])))


def charted(assessment: Assessment) -> tuple[SharedRanks, ...]:
    """The kinds of GPUs that need most, one for each different course of memory."""
    seen: dict[object, SharedRanks] = {}
    for shared in assessment.shared:
        key = tuple(
            (s.node, s.total_bytes) for s in steps(assessment, shared) if s.node in assessment.call_memory
        )
        if key in seen:
            merged = (*seen[key].ranks, *shared.ranks)
            seen[key] = SharedRanks(tuple(sorted(merged)), seen[key].nodes)
        else:
            seen[key] = shared
    peaks = {id(s): max((t.total_bytes for t in steps(assessment, s)), default=0) for s in seen.values()}
    return tuple(sorted(seen.values(), key=lambda s: -peaks[id(s)])[:MOST_CHARTS])


def memory_chart(assessment: Assessment, shared: SharedRanks, colours: Mapping[str, str]) -> str:
    found = steps(assessment, shared)
    capacity = assessment.capacity_bytes
    peak = max(step.total_bytes for step in found)
    drawing = Drawing(CHART_HEIGHT, f"memory of GPUs {shared.name} over an iteration", CHART_WIDTH)
    high = 1.08 * max(capacity if peak > 0.25 * capacity else 0, peak)
    scale = (CHART_HEIGHT - TOP - BOTTOM) / high
    wide = (CHART_WIDTH - LEFT - RIGHT) / max(assessment.iteration_s, 1e-12)
    foot = CHART_HEIGHT - BOTTOM
    name = shared.name if len(shared.name) < 40 else f"{shared.ranks[0]} and {len(shared.ranks) - 1} alike"
    drawing.text(
        LEFT, 14, f"GPU{'s' if len(shared.ranks) > 1 else ''} {name}: at most {gib(peak)}", css="strong"
    )
    unit = GIB if high > GIB else 1 << 20
    for value in ticks(high / unit, 5):
        y = foot - value * unit * scale
        drawing.line(LEFT, y, CHART_WIDTH - RIGHT, y, "grid")
        drawing.text(LEFT - 6, y + 4, f"{value:g}", anchor="end", size=11)
    drawing.text(6, 14, "GiB" if unit == GIB else "MiB", size=11, css="faint")
    for step in found:
        x, span = LEFT + step.start_s * wide, (step.end_s - step.start_s) * wide
        y = foot
        for cause, colour in colours.items():
            size = step.by_cause.get(cause, 0)
            if size > 0:
                y -= size * scale
                title = f"{step.node or 'idle'}: {cause.replace('_', ' ')} {gib(size)}"
                drawing.rect(x, y, span, size * scale, colour, title=title)
        if step.node in assessment.call_memory:
            drawing.line(x, foot, x, foot + 5)
            drawing.label(x, foot + 3, span, 16, (step.node, step.node.replace("_", " ").split()[0]))
    for value in ticks(assessment.iteration_s, 6):
        drawing.text(LEFT + value * wide, foot + 32, f"{value:.3g}", anchor="middle", size=11, css="faint")
    drawing.text(
        (LEFT + CHART_WIDTH) / 2, foot + 47, "seconds of an iteration", anchor="middle", size=11, css="faint"
    )
    if capacity <= high:
        y = foot - capacity * scale
        drawing.line(LEFT, y, CHART_WIDTH - RIGHT, y, "capacity")
        drawing.text(
            CHART_WIDTH - RIGHT - 4,
            y - 4,
            f"may be used: {gib(capacity)}",
            anchor="end",
            size=11,
            css="alarm",
        )
    return drawing.markup()
