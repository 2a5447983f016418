"""A fit as text for people (100 columns), as JSON for programs, and as an SVG plot. Computes nothing new."""

from __future__ import annotations

import json
from typing import Any

from planner.fit import WORTH, Fit, Point
from planner.options import gib
from planner.report import table
from planner.words import paragraph, share


def fit_text(found: Fit) -> str:
    header = ("GPUs", "cluster", "s/iteration", "GPU-h/1000", "gain", "peak memory", "idle")
    rows = [_row(found, point) for point in found.points]
    legend = (
        "GPU-h/1000: GPU-hours for 1,000 samples. gain: the share of the added GPUs that became speed, "
        "100% when twice the GPUs are twice as fast."
    )
    lines = [table(header, rows, right=(0, 2, 3, 4, 5, 6)), paragraph(legend), "", _answer(found)]
    for point in found.points:
        if point.assessment is None:
            lines.append(paragraph(f"{_gpus(point)}: does not fit. {' '.join(point.why)}", "  ", ""))
        elif point.kept is not None:
            lines.append(
                paragraph(
                    f"{_gpus(point)}: no faster; the plan for {point.kept} GPUs is still the best found, and "
                    f"the others are idle.",
                    "  ",
                    "",
                )
            )
        elif point.why:
            gain = found.efficiency(point)
            assert gain is not None
            text = f"{_gpus(point)}: {share(max(0.0, gain), 1.0)} of the added GPUs became speed: "
            lines.append(paragraph(text + ", ".join(point.why) + ".", "  ", ""))
    return "\n".join(lines)


def _answer(found: Fit) -> str:
    least, knee = found.least, found.knee
    if least is None or knee is None:
        largest = found.points[-1]
        text = f"It does not fit on up to {_gpus(largest)}."
    else:
        text = f"It fits from {_gpus(least)} on ({least.iteration_s:.4g} s per iteration)."
        if knee is next(p for p in reversed(found.points) if p.assessment is not None):
            text += f" Up to {_gpus(knee)}, at least {WORTH:.0%} of the GPUs added at each step became speed."
        else:
            text += (
                f" The knee is at {_gpus(knee)} ({knee.iteration_s:.4g} s per iteration): beyond it less "
                f"than {WORTH:.0%} of the GPUs added become speed."
            )
    return paragraph(text)


def _gpus(point: Point) -> str:
    return f"{point.num_gpus} GPU" + ("s" if point.num_gpus > 1 else "")


def _row(found: Fit, point: Point) -> tuple[str, ...]:
    a = point.assessment
    if a is None:
        return (str(point.num_gpus), str(point.cluster), "does not fit", "-", "-", "-", "-")
    gain = found.efficiency(point)
    mark = " <- knee" if point is found.knee else ""
    return (
        str(point.num_gpus),
        f"{point.cluster}{mark}",
        f"{a.iteration_s:.4g}",
        f"{point.gpu_hours:.3g}",
        "-" if gain is None else f"{gain:.0%}",
        gib(a.memory.total_bytes),
        f"{a.idle_share:.0%}",
    )


def fit_json(found: Fit) -> str:
    content = {
        "least_gpus": None if found.least is None else found.least.num_gpus,
        "knee_gpus": None if found.knee is None else found.knee.num_gpus,
        "points": [_json(found, point) for point in found.points],
    }
    return json.dumps(content, indent=2)


def _json(found: Fit, point: Point) -> dict[str, Any]:
    a = point.assessment
    return {
        "gpus": point.num_gpus,
        "nodes": point.cluster.num_nodes,
        "gpus_per_node": point.cluster.gpus_per_node,
        "fits": a is not None,
        "iteration_s": point.iteration_s,
        "gpu_hours_per_1000_samples": point.gpu_hours,
        "gain": found.efficiency(point),
        "peak_bytes": None if a is None else a.memory.total_bytes,
        "idle_share": None if a is None else a.idle_share,
        "kept_from_gpus": point.kept,
        "why": list(point.why),
    }
