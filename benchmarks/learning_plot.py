"""Learning curves as one SVG file: a chart for each quantity over the iterations, a line for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from statistics import fmean

from planner.page.svg import Drawing

PITCH, HEIGHT, CHART = 450.0, 300.0, 380.0
LEFT, TOP, FOOT = 56.0, 40.0, 250.0
_STYLE = (
    "text{fill:#1b1f24}.grid{stroke:#d5d9de}.seed{fill:none;stroke:#8ab8d8;"
    "stroke-width:1}.mean{fill:none;stroke:#0072B2;stroke-width:2.5}"
    ".other-seed{fill:none;stroke:#f0b27f;stroke-width:1}.other-mean{fill:none;stroke:#D55E00;stroke-width:2.5}"
)
_CLASSES = ("", "other-")
Curves = Sequence[Sequence[float]]


def learning_plot(title: str, charts: Sequence[tuple[str, Curves]]) -> str:
    """The text of the SVG file: two charts or one, each a name and a curve for each seed."""
    return _page(title, 2, [(name, [curves]) for name, curves in charts])


def comparison_plot(
    title: str, sides: tuple[str, str], charts: Sequence[tuple[str, Sequence[Curves]]]
) -> str:
    """The text of the SVG file: charts side by side, each a name and the curves of both sides."""
    return _page(title, len(charts), charts, sides)


def _page(
    title: str, places: int, charts: Sequence[tuple[str, Sequence[Curves]]], sides: Sequence[str] = ()
) -> str:
    width = places * PITCH
    drawing = Drawing(HEIGHT, title, width)
    for index, (name, curves) in enumerate(charts):
        _chart(drawing, index * PITCH, f"{title}: {name}", curves)
    for index, (side, css) in enumerate(zip(sides, _CLASSES, strict=False)):
        x, y = LEFT + 76.0 * index, FOOT + 34
        drawing.line(x, y - 4, x + 16, y - 4, f"{css}mean")
        drawing.text(x + 21, y, side, size=12)
    return drawing.file(_STYLE)


def _chart(drawing: Drawing, left: float, title: str, sides: Sequence[Curves]) -> None:
    drawing.text(left + LEFT, 22, title, css="strong", size=13)
    x0, wide = left + LEFT, CHART - LEFT
    count = min(len(curve) for curves in sides for curve in curves)
    values = [value for curves in sides for curve in curves for value in curve]
    low, high = min(values), max(*values, min(values) + 1e-6)
    step = _step(high - low)
    low, high = floor(low / step) * step, -floor(-high / step) * step

    def at(iteration: int, value: float) -> tuple[float, float]:
        x = x0 + wide * iteration / max(1, count - 1)
        return x, FOOT - (value - low) / (high - low) * (FOOT - TOP)

    for index in range(round((high - low) / step) + 1):
        value = low + index * step
        y = at(0, value)[1]
        drawing.line(x0, y, x0 + wide, y, "grid")
        drawing.text(x0 - 6, y + 4, f"{round(value, 6):g}", anchor="end", size=11)
    for iteration in range(0, count, max(1, round(_step(count)))):
        drawing.text(at(iteration, low)[0], FOOT + 16, str(iteration + 1), anchor="middle", size=11)
    drawing.text(x0 + wide / 2, FOOT + 34, "iteration", anchor="middle", size=11, css="faint")
    for curves, css in zip(sides, _CLASSES, strict=False):
        for curve in curves:
            drawing.polyline([at(i, curve[i]) for i in range(count)], f"{css}seed")
    for curves, css in zip(sides, _CLASSES, strict=False):
        drawing.polyline([at(i, fmean(curve[i] for curve in curves)) for i in range(count)], f"{css}mean")


def _step(span: float) -> float:
    """A round distance of which about five make the span."""
    power = 10.0 ** floor(log10(span / 5))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 5 * (1 - 1e-9))
