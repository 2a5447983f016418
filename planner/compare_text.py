"""A comparison as text for people (100 columns) and as JSON for programs. Computes nothing new."""

from __future__ import annotations

import json
from typing import Any

from planner.baselines import savings
from planner.budget import budget, kinds_of
from planner.compare import Comparison, Contender
from planner.options import gib
from planner.report import table
from planner.words import paragraph
from realloc.strategy import strategy_content


def comparison_text(found: Comparison) -> str:
    """A table of all plans, then what each slower one loses by."""
    best = found.searched.assessment
    assert best is not None
    plan = best.plan
    rows = [_row(found, contender) for contender in (found.searched, *found.others)]
    header = ("plan", "s/iteration", "tokens/s", "slower", "peak memory", "idle")
    lines = [
        f"{plan.experiment.algorithm} on {plan.cluster} (costs: {best.costs.provenance})",
        "",
        table(header, rows, right=(1, 2, 3, 4, 5)),
        "",
        paragraph(
            "What the others lose by, in seconds of all GPUs' time. With what a plan gains elsewhere it adds "
            "up to its distance from the searched plan."
        ),
    ]
    for contender in found.others:
        lines += ["", paragraph(f"{contender.name}: {contender.description}.", "    ", "  ")]
        done = savings(contender.assessment.plan.placements) if contender.assessment else ()
        if done:
            lines.append(paragraph(f"Runs with: {'; '.join(done)}.", "    "))
        slower = found.slower(contender)
        if slower is None:
            text = f"does not fit: {' '.join(contender.why)}"
        elif slower <= 1:
            text = f"not slower: {1 / slower:.3f} times as fast as the searched plan; search longer."
        else:
            text = f"{slower:.2f} times as long: {'; '.join(contender.why) or 'equal but for the order'}."
        lines.append(paragraph(text, "    "))
    return "\n".join(lines)


def _row(found: Comparison, contender: Contender) -> tuple[str, ...]:
    a = contender.assessment
    if a is None:
        return (contender.name, "-", "-", "-", "does not fit", "-")
    slower = found.slower(contender)
    return (
        contender.name,
        f"{a.iteration_s:.4g}",
        f"{a.tokens_per_s:,.0f}",
        "does not fit" if slower is None else f"{slower:.2f}x",
        gib(a.memory.total_bytes),
        f"{a.idle_share:.0%}",
    )


def comparison_json(found: Comparison) -> str:
    """Everything of the text and the placements. Seconds and bytes are in the keys' names."""
    best = found.searched.assessment
    assert best is not None
    content = {
        "algorithm": best.plan.experiment.algorithm,
        "cluster": str(best.plan.cluster),
        "costs": best.costs.provenance,
        "capacity_bytes": best.capacity_bytes,
        "plans": [_json(found, contender) for contender in (found.searched, *found.others)],
    }
    return json.dumps(content, indent=2)


def _json(found: Comparison, contender: Contender) -> dict[str, Any]:
    a = contender.assessment
    content: dict[str, Any] = {
        "name": contender.name,
        "description": contender.description,
        "fits": contender.fits,
        "why": list(contender.why),
    }
    if a is not None:
        content |= {
            "iteration_s": a.iteration_s,
            "tokens_per_s": a.tokens_per_s,
            "slower": found.slower(contender),
            "peak_bytes": a.memory.total_bytes,
            "idle_share": a.idle_share,
            "split_s": dict(kinds_of(budget(a))),
            "placements": {
                name: {"mesh": str(p.mesh), "strategy": strategy_content(p.strategy)}
                for name, p in a.plan.placements.items()
            },
        }
    return content
