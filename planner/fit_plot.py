"""A fit as one SVG file: seconds per iteration and GPU-hours for 1,000 samples over the number of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, log10

from planner.fit import Fit, Point
from planner.page.svg import Drawing, ticks

WIDTH, HEIGHT, CHART = 900.0, 330.0, 380.0
LEFT, TOP, FOOT = 56.0, 40.0, 270.0
_STYLE = (
    "text{fill:#1b1f24}.grid{stroke:#d5d9de}.curve{fill:none;stroke:#0072B2;"
    "stroke-width:2}.ideal{fill:none;stroke:#8a8f98;stroke-dasharray:5 4}.dot{fill:#0072B2}"
    ".knee{fill:#D55E00}"
)


def fit_plot(found: Fit) -> str:
    """The text of the SVG file; GPUs on a logarithmic axis. Sizes that do not fit are marked below."""
    drawing = Drawing(HEIGHT, "seconds per iteration and GPU-hours over GPUs", WIDTH)
    _chart(drawing, found, 0.0, "seconds per iteration", lambda p: p.iteration_s, ideal=True)
    _chart(drawing, found, WIDTH / 2, "GPU-hours for 1,000 samples", lambda p: p.gpu_hours, ideal=False)
    return drawing.file(_STYLE)


def _chart(
    drawing: Drawing,
    found: Fit,
    left: float,
    title: str,
    value: Callable[[Point], float | None],
    *,
    ideal: bool,
) -> None:
    drawing.text(left + LEFT, 22, title, css="strong", size=13)
    xs = [point.num_gpus for point in found.points]
    values = [v for v in map(value, found.points) if v is not None]
    low_x, high_x = log10(min(xs)), max(log10(max(xs)), log10(min(xs)) + 0.3)
    x0, wide = left + LEFT, CHART - LEFT
    for count in xs:
        x = x0 + (log10(count) - low_x) / (high_x - low_x) * wide
        drawing.line(x, TOP, x, FOOT, "grid")
        drawing.text(x, FOOT + 16, str(count), anchor="middle", size=11)
    drawing.text(x0 + wide / 2, FOOT + 34, "GPUs", anchor="middle", size=11, css="faint")
    if not values:
        drawing.text(x0 + wide / 2, (TOP + FOOT) / 2, "does not fit", anchor="middle")
        return
    # time falls by factors: logarithmic; cost is compared by size: from 0 on
    scale: Callable[[float], float] = log10 if ideal else float
    low_y = log10(min(values)) - 0.05 if ideal else 0.0
    high_y = log10(max(values)) + 0.1 if ideal else 1.15 * max(values)

    def at(count: int, number: float) -> tuple[float, float]:
        x = x0 + (log10(count) - low_x) / (high_x - low_x) * wide
        return x, FOOT - (scale(number) - low_y) / (high_y - low_y) * (FOOT - TOP)

    for number in _round_numbers(low_y, high_y) if ideal else ticks(high_y, 6):
        y = at(xs[0], number)[1]
        drawing.line(x0, y, x0 + wide, y, "grid")
        drawing.text(x0 - 6, y + 4, f"{number:g}", anchor="end", size=11)
    fitting = [(point, v) for point in found.points if (v := value(point)) is not None]
    if ideal:
        first, seconds = fitting[0]
        line = [(p.num_gpus, seconds * first.num_gpus / p.num_gpus) for p, _ in fitting]
        drawing.polyline([at(n, s) for n, s in line if log10(s) >= low_y], "ideal")
    drawing.polyline([at(point.num_gpus, v) for point, v in fitting], "curve")
    for point, v in fitting:
        x, y = at(point.num_gpus, v)
        is_knee = point is found.knee
        drawing.circle(x, y, 6 if is_knee else 4, "knee" if is_knee else "dot")
        if is_knee:
            drawing.text(
                x + 9, y - 8 if ideal else y + 18, f"knee: {point.num_gpus} GPUs", size=11, css="strong"
            )
    for point in found.points:
        if value(point) is None:
            x = x0 + (log10(point.num_gpus) - low_x) / (high_x - low_x) * wide
            drawing.text(x, FOOT - 6, "×", anchor="middle", css="faint", size=14)
    if ideal:
        drawing.text(
            x0, HEIGHT - 8, "dashed: twice the GPUs, half the time.  ×: does not fit", size=11, css="faint"
        )


def _round_numbers(low: float, high: float) -> Sequence[float]:
    """1, 2 and 5 times powers of ten between two logarithms."""
    powers = range(floor(low), ceil(high) + 1)
    return [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= log10(f * 10.0**p) <= high]
